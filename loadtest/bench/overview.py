"""The overview of a comparison: one column per load, and Quire as a ratio to its peers.

Each ratio is stated twice: to the best peer of equal quality or better, whose perplexity is at most
1 % above that of Quire's weights, and to the best of any quality. A peer whose perplexity is not
known counts for the latter only. A peer with drafts does not count for Quire without them. The best
peer is chosen per load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loadtest.bench.document import Document
from loadtest.bench.measure import Result
from loadtest.bench.table import Table, number
from loadtest.bench.views import View, chat_view, decode_view, median, prefill_view

EQUAL_WITHIN = 0.01  # of the perplexity
BUSY = 3  # load per core above which other work distorts tokens per second
_QUIRE, _PLAIN, _DRAFTS = "quire", "-plain", "-drafts"  # the latter two end names
_SHOWN = ("quire", "quire-plain", "quire-int4-plain")  # in a README
_LABELS: Mapping[str, str] = {
    "quire": "Quire, 8 bits",
    "quire-plain": "Quire, 8 bits, without drafts",
    "quire-int4": "Quire, 4 bits",
    "quire-int4-plain": "Quire, 4 bits, without drafts",
    "quire-redis": "Quire, 8 bits, over Redis",
    "quire-torch": "Quire, torch runner, bfloat16",
    "transformers": "`transformers serve`, bfloat16",
    "vllm": "vLLM, bfloat16",
}
_ENGINES = {"llama.cpp": "llama.cpp", "xllamacpp": "llama.cpp (AVX2)", "openvino": "OpenVINO"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A figure of a result, and which of two servers is better by it."""

    title: str
    figure: Callable[[Result], float]
    less_is_better: bool = False
    digits: int = 0

    def best(self, view: View, servers: list[str]) -> str | None:
        """The server with the best median; None if none has one."""
        known = {name: view.median(name, self.figure) for name in servers}
        known = {name: value for name, value in known.items() if value > 0}
        choose = min if self.less_is_better else max
        return choose(known, key=lambda name: known[name]) if known else None

    def ratio(self, view: View, mine: str, theirs: str) -> float:
        """How many times better `mine` is: the median over the repeats that both have."""
        figures = {row.repeat: self.figure(row) for row in view.of(theirs)}
        pairs = [
            (self.figure(row), figures[row.repeat])
            for row in view.of(mine)
            if row.repeat in figures
        ]
        ratios = [first / second for first, second in pairs if first > 0 and second > 0]
        return median([1 / ratio if self.less_is_better else ratio for ratio in ratios])


SPEED = Measure(title="Tokens per second", figure=lambda row: row.speed)
CPU = Measure(
    title="CPU seconds per 1,000 tokens",
    figure=lambda row: row.cpu,
    less_is_better=True,
    digits=1,
)


def label(name: str) -> str:
    engine, _, kind = name.partition("-")
    kind, _, drafts = kind.partition("-")
    known = f"{_ENGINES[engine]}, {kind.upper()}" if engine in _ENGINES else name
    known += ", drafts" if engine in _ENGINES and drafts else ""
    return _LABELS.get(name, known)


def is_peer(name: str) -> bool:
    return not name.startswith(_QUIRE)


def peers_of(document: Document, name: str, *, equal: bool) -> list[str]:
    """All peers, or those whose quality is equal to that of this Quire, or better."""
    peers = [other for other in document.servers if is_peer(other)]
    if name.endswith(_PLAIN):
        peers = [other for other in peers if not other.endswith(_DRAFTS)]
    if not equal:
        return peers
    limit = document.perplexity.get(name, math.nan) * (1 + EQUAL_WITHIN)
    return [other for other in peers if document.perplexity.get(other, math.nan) <= limit]


def is_busy(document: Document) -> bool:
    """Whether other work distorted the tokens per second."""
    return median([row.load_before for row in document.results]) > BUSY * document.machine.cpus


def views_of(document: Document) -> dict[str, View]:
    """By the name of the load."""
    sizes = document.sizes
    views = {f"{n} client{'s' * (n > 1)}": decode_view(document, n) for n in sizes.clients}
    views |= {f"chat, {n}": chat_view(document, n) for n in sizes.chat_clients}
    views[f"prompt of {sizes.prefill_tokens}"] = prefill_view(document)
    return {name: view for name, view in views.items() if view.servers}


def overview(document: Document) -> Iterator[Table]:
    """Speed, CPU time, the ratios of both, the fraction of the roof; CPU time if it was busy."""
    busy = is_busy(document)
    measures = (CPU,) if busy else (SPEED, CPU)
    for measure in measures:
        yield _figures(document, measure)
    for measure in measures:
        yield from _ratios(document, measure)
    if document.roofs and not busy:
        yield _roofs(document)


def short_table(document: Document) -> Table:
    """For a README: without some variants of Quire; CPU time if the machine was busy."""
    measure = CPU if is_busy(document) else SPEED
    whole = _figures(document, measure)
    wanted = {label(name) for name in document.servers if is_peer(name) or name in _SHOWN}
    rows = [row for row in whole.rows if row[0] in wanted]
    for table in _ratios(document, measure):
        rows += [
            [f"{row[0]}: times better than the best of {row[1]}", "", *row[2:]]
            for row in table.rows
            if row[0] == label(_QUIRE + _PLAIN)
        ]
    return Table(title=whole.title, columns=whole.columns, rows=rows)


def _measured(document: Document) -> list[str]:
    return [
        name for name in document.servers if any(row.server == name for row in document.results)
    ]


def _figures(document: Document, measure: Measure) -> Table:
    views = views_of(document)
    return Table(
        title=measure.title,
        columns=["server", "perplexity", *views],
        rows=[
            [
                label(name),
                number(document.perplexity.get(name, math.nan), 2),
                *(
                    number(view.median(name, measure.figure), measure.digits)
                    for view in views.values()
                ),
            ]
            for name in _measured(document)
        ],
    )


def _ratios(document: Document, measure: Measure) -> Iterator[Table]:
    views, measured = views_of(document), _measured(document)
    if not any(map(is_peer, measured)):
        return
    yield Table(
        title=f"{measure.title}: how many times better Quire is",
        columns=["server", "than the best peer of", *views],
        rows=[
            [
                label(name),
                "equal quality" if equal else "any quality",
                *(_against(view, measure, name, equal=equal) for view in views.values()),
            ]
            for name in measured
            if not is_peer(name)
            for equal in (True, False)
        ],
    )


def _against(view: View, measure: Measure, name: str, *, equal: bool) -> str:
    """The ratio and the peer."""
    peer = measure.best(view, peers_of(view.document, name, equal=equal))
    ratio = math.nan if peer is None else measure.ratio(view, name, peer)
    return "" if peer is None or math.isnan(ratio) else f"{ratio:.2f} {label(peer)}"


def _roofs(document: Document) -> Table:
    views = {name: view for name, view in views_of(document).items() if "chat" not in name}
    return Table(
        title="Fraction of the roof",
        columns=["server", *views],
        rows=[
            [label(name), *(number(view.of_roof(name), 2) for view in views.values())]
            for name in _measured(document)
        ],
    )
