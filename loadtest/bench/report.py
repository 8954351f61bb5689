"""Tables of a comparison: medians over its repeats, for a terminal and in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

from loadtest.bench.document import Document
from loadtest.bench.measure import FIRST_TOKEN_WITHIN, PER_TOKEN_WITHIN, Kind, Result

_BUSY_CLIENT = 0.5  # of a core; above that the client may be the bottleneck
_EMBEDDED, _REDIS = "quire", "quire-redis"
_OTHER_PROMPT = 0.02  # tolerated difference of prompt token counts between servers


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text. The first column is left-aligned, all others right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class View:
    """Results of one kind of load at one level, by server."""

    document: Document
    kind: Kind
    level: float

    @property
    def servers(self) -> list[str]:
        return [name for name in self.document.servers if self.of(name)]

    def of(self, server: str) -> list[Result]:
        """Results of a server, one per repeat."""
        return [
            result
            for result in self.document.results
            if (result.server, result.kind, result.level) == (server, self.kind, self.level)
        ]

    def median(self, server: str, figure: Callable[[Result], float]) -> float:
        """Over the repeats that have the figure; NaN if none has."""
        return median([figure(result) for result in self.of(server)])

    def ratio(self, base: str, server: str) -> float:
        """Median of base speed / server speed over the repeats in which both succeeded."""
        return median(ratios(self.of(base), self.of(server)))

    def of_roof(self, server: str) -> float:
        """Median of server speed / roof of the same repeat."""
        roofs = self.roofs
        results = [result for result in self.of(server) if 0 <= result.repeat < len(roofs)]
        return median([result.speed / roofs[result.repeat] for result in results])

    @property
    def roofs(self) -> list[float]:
        """Tokens per second, one per repeat."""
        weights, level = self.document.weights, int(self.level)
        if self.kind is Kind.PREFILL:
            return [roof.prefill(weights, tokens=level) for roof in self.document.roofs]
        return [roof.decode(weights, rows=level) for roof in self.document.roofs]


def median(values: Sequence[float]) -> float:
    """Ignores NaN; NaN if nothing is left."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def ratios(base: Sequence[Result], other: Sequence[Result]) -> list[float]:
    """Speed of `base` / speed of `other` for each repeat in which both succeeded."""
    speeds = {result.repeat: result.speed for result in other}
    pairs = [(result.speed, speeds[result.repeat]) for result in base if result.repeat in speeds]
    return [mine / theirs for mine, theirs in pairs if mine > 0 and theirs > 0]


def goodput(document: Document, server: str) -> float:
    """Maximum of good requests per second over all rates; NaN if not measured."""
    good = [
        row.level * row.good / row.summary.requests
        for row in document.results
        if row.server == server and row.kind is Kind.ARRIVALS
    ]
    return max(good, default=math.nan)


def decode_view(document: Document, clients: int) -> View:
    return View(document, Kind.DECODE, clients)


def prefill_view(document: Document) -> View:
    return View(document, Kind.PREFILL, document.sizes.prefill_tokens)


def tables(document: Document) -> list[Table]:
    return [
        *(_decode_table(decode_view(document, clients)) for clients in document.sizes.clients),
        _prompt_table(document),
        *_goodput_tables(document),
        *_redis_tables(document),
        *_roof_tables(document),
        *_reason_tables(document),
    ]


def markdown(document: Document) -> str:
    """The tables, with machine, versions and method."""
    sizes, repeats = document.sizes, 1 + max(result.repeat for result in document.results)
    packages = ", ".join(f"{name} {number}" for name, number in document.machine.packages.items())
    threads = ", ".join(f"{name} {number}" for name, number in document.threads.items())
    measured_on = f"{document.date}, {document.machine}; {document.machine.system}; {packages}."
    how = (
        f"Model {document.model}. {sizes.tokens_in} prompt tokens, {sizes.tokens_out} output"
        " tokens, greedy, streamed over HTTP, all clients start together, client and server on the"
        f" same machine. Medians of interleaved repeats ({repeats}); `{document.base} is` is the"
        " median of the ratios within a repeat. Times in ms. The roof is the limit by memory"
        " bandwidth and 8-bit multipliers for the products alone."
    )
    peers = (
        "llama.cpp and OpenVINO: types other than the file's own are requantised, to compare speed"
        " only."
    )
    counts = {name: _repeats(document, name) for name in document.servers}
    if fewer := [f"{name} ({n})" for name, n in counts.items() if 0 < n < repeats]:
        peers += f" Fewer repeats: {', '.join(fewer)}."
    if threads:
        peers += f" Best number of threads: {threads}."
    lines = [measured_on, how, peers]
    return "\n\n".join([*lines, *(table.to_markdown() for table in tables(document))])


def _repeats(document: Document, server: str) -> int:
    return len({result.repeat for result in document.results if result.server == server})


def warnings(document: Document) -> Iterator[str]:
    """Failures, a busy client, differing prompts."""
    judged = [row for row in document.results if row.kind is not Kind.ARRIVALS]
    for row in judged:
        for error in row.summary.errors:
            yield f"{row.server}, {row.kind} {row.level:g}: {error}"
    if any(row.client_cpu > _BUSY_CLIENT * row.summary.wall for row in judged):
        yield "The client used over half a core: it may have been the bottleneck."
    counted = {
        (row.server, row.kind, row.level): row.summary.prompt_tokens
        for row in judged
        if row.repeat == 0 and not row.summary.failures and row.summary.prompt_tokens
    }
    for (server, kind, level), tokens in counted.items():
        expected = counted.get((document.base, kind, level), tokens)
        if abs(tokens - expected) > _OTHER_PROMPT * expected:
            yield f"{server}, {kind} {level:g}: counts {tokens} prompt tokens, not {expected}"


def _decode_table(view: View) -> Table:
    base, clients = view.document.base, int(view.level)
    columns = ["server", "tok/s", f"{base} is", "of roof", "TTFT p50", "per token", "gap p50"]
    columns += ["gap p99", "failed", "server CPU s", "RSS MB", "client core"]
    return Table(
        title=f"{clients} client{'s' * (clients > 1)}",
        columns=columns,
        rows=[_decode_row(view, name) for name in view.servers],
    )


def _decode_row(view: View, name: str) -> list[str]:
    rows = view.of(name)
    return [
        name,
        _number(view.median(name, lambda row: row.speed), 1),
        _number(view.ratio(view.document.base, name), 2, unit=" x"),
        _number(view.of_roof(name), 2),
        _number(1e3 * view.median(name, lambda row: row.summary.time_to_first_p50)),
        _number(1e3 * view.median(name, lambda row: row.summary.time_per_token_p50), 1),
        _number(1e3 * view.median(name, lambda row: row.summary.gap_p50), 1),
        _number(1e3 * view.median(name, lambda row: row.summary.gap_p99), 1),
        _failed(rows),
        _number(view.median(name, lambda row: row.server_cpu), 1),
        _number(view.median(name, lambda row: row.rss_peak) / 1e6),
        _number(view.median(name, lambda row: row.client_cpu / row.summary.wall), 2),
    ]


def _prompt_table(document: Document) -> Table:
    view = prefill_view(document)
    return Table(
        title=f"Prompts of {view.level:g} tokens, one client",
        columns=["server", "prompt tok/s", f"{document.base} is", "of roof", "TTFT p50", "failed",
                 "ready in s"],
        rows=[
            [
                name,
                _number(view.median(name, lambda row: row.speed)),
                _number(view.ratio(document.base, name), 2, unit=" x"),
                _number(view.of_roof(name), 2),
                _number(1e3 * view.median(name, lambda row: row.summary.time_to_first_p50)),
                _failed(view.of(name)),
                _number(view.median(name, lambda row: row.start_seconds), 1),
            ]
            for name in view.servers
        ],
    )  # fmt: skip


def _goodput_tables(document: Document) -> Iterator[Table]:
    """Rates above one at which fewer than half were good have empty cells."""
    rates = sorted({row.level for row in document.results if row.kind is Kind.ARRIVALS})
    if not rates:
        return
    views = [View(document, Kind.ARRIVALS, rate) for rate in rates]
    yield Table(
        title=f"Goodput, requests per second with TTFT within {FIRST_TOKEN_WITHIN:g} s and"
        f" {1e3 * PER_TOKEN_WITHIN:g} ms per token; good/all at each Poisson rate"
        f" ({document.sizes.tokens_out_arrivals} output tokens)",
        columns=["server", "goodput", *(f"{rate:g}/s" for rate in rates)],
        rows=[
            [
                name,
                _number(goodput(document, name), 1),
                *(
                    " ".join(f"{row.good}/{row.summary.requests}" for row in view.of(name))
                    for view in views
                ),
            ]
            for name in document.servers
            if not math.isnan(goodput(document, name))
        ],
    )


def _redis_tables(document: Document) -> Iterator[Table]:
    """Cost of replicas joined by Redis on one machine, relative to one process."""
    views = [decode_view(document, clients) for clients in document.sizes.clients]
    views = [view for view in views if {_EMBEDDED, _REDIS} <= set(view.servers)]
    if not views:
        return
    yield Table(
        title="Redis mode (API, engine and Redis on this machine) and one process",
        columns=["clients", "one process tok/s", "Redis tok/s", "Redis costs"],
        rows=[
            [
                f"{view.level:g}",
                *(_number(view.median(name, lambda row: row.speed), 1) for name in
                  (_EMBEDDED, _REDIS)),
                _number(100 * (1 - view.ratio(_REDIS, _EMBEDDED)), unit=" %"),
            ]
            for view in views
        ],
    )  # fmt: skip


def _roof_tables(document: Document) -> Iterator[Table]:
    if not document.roofs:
        return
    memory = median([roof.bytes_a_second for roof in document.roofs])
    products = median([roof.products_a_second for roof in document.roofs])
    variants = ", ".join(dict.fromkeys(roof.variant for roof in document.roofs))
    views = [decode_view(document, clients) for clients in document.sizes.clients]
    rows = [[f"M = {view.level:g}", _number(median(view.roofs))] for view in views]
    prefill = prefill_view(document)
    rows.append([f"prefill of {prefill.level:g}", _number(median(prefill.roofs))])
    rates = f"memory {memory / 1e9:.1f} GB/s, {products / 1e9:.0f} G products/s"
    yield Table(
        title=f"Roof ({variants}, {rates})",
        columns=["rows per step", "max tok/s"],
        rows=rows,
    )


def _reason_tables(document: Document) -> Iterator[Table]:
    if document.left_out:
        yield Table(
            title="Left out, wholly or partly",
            columns=["server", "reason"],
            rows=[[name, reason.replace("|", "/")] for name, reason in document.left_out.items()],
        )


def _failed(rows: Sequence[Result]) -> str:
    """Failed / all requests over all repeats."""
    failures = sum(row.summary.failures for row in rows)
    return f"{failures}/{sum(row.summary.requests for row in rows)}"


def _number(value: float, digits: int = 0, *, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}{unit}"
