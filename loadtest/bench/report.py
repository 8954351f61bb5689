"""Tables of a comparison: medians over its repeats, for a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from loadtest.bench.document import Document
from loadtest.bench.measure import FIRST_TOKEN_WITHIN, PER_TOKEN_WITHIN, Kind, Result
from loadtest.bench.overview import is_busy, overview
from loadtest.bench.table import Table, number
from loadtest.bench.views import View, chat_view, decode_view, goodput, median, prefill_view

_BUSY_CLIENT = 0.5  # of a core; above that the client may be the bottleneck
_EMBEDDED, _REDIS = "quire", "quire-redis"
_OTHER_PROMPT = 0.02  # tolerated difference of prompt token counts between servers


def tables(document: Document) -> list[Table]:
    sizes = document.sizes
    chats = [chat_view(document, clients) for clients in sizes.chat_clients]
    return [
        *overview(document),
        *(_decode_table(decode_view(document, clients)) for clients in sizes.clients),
        *(_decode_table(view) for view in chats if view.servers),
        _prompt_table(document),
        *_goodput_tables(document),
        *_redis_tables(document),
        *_roof_tables(document),
        *_reason_tables(document),
    ]


def markdown(document: Document) -> str:
    """The tables, with machine, versions and method."""
    parts = [*method(document), *(table.to_markdown() for table in tables(document))]
    return "\n\n".join(parts)


def method(document: Document) -> list[str]:
    """Paragraphs: where, with which versions, how."""
    sizes = document.sizes
    packages = ", ".join(f"{name} {number}" for name, number in document.machine.packages.items())
    measured_on = f"{document.date}, {document.machine}; {document.machine.system}; {packages}."
    if document.variant:
        measured_on += (
            f" Restricted to {document.variant.upper()}: Quire by its variant, llama.cpp by its"
            " build, torch by ONEDNN_MAX_CPU_ISA. OpenVINO fails if oneDNN is limited, and is left"
            " out. This stands in for machines without more, whose caches and clocks differ."
        )
    how = (
        f"Model {document.model}. {sizes.tokens_in} prompt tokens, {sizes.tokens_out} output"
        f" tokens, greedy; chat: varied questions, temperature 0.7, natural ends, at most"
        f" {sizes.chat_tokens} tokens. Streamed over HTTP, all clients start together, client and"
        f" server on the same machine. Medians of interleaved repeats ({_all_repeats(document)});"
        " ratios are medians of those within a repeat. CPU seconds are those of the server's"
        " processes. Perplexity: second halves of windows of 512 tokens, the same text for all. The"
        " roof is the limit by memory bandwidth and 8-bit multipliers for the products alone."
    )
    return [measured_on, how, _about_peers(document)]


def _about_peers(document: Document) -> str:
    repeats = _all_repeats(document)
    text = (
        "llama.cpp and OpenVINO: types other than the file's own are requantised from it. xllamacpp"
        " is llama.cpp built for AVX2."
    )
    counts = {name: _repeats(document, name) for name in document.servers}
    if fewer := [f"{name} ({n})" for name, n in counts.items() if 0 < n < repeats]:
        text += f" Fewer repeats: {', '.join(fewer)}."
    if threads := ", ".join(f"{name} {count}" for name, count in document.threads.items()):
        text += f" Best number of threads: {threads}."
    if is_busy(document):
        load = median([row.load_before for row in document.results])
        text += (
            f" Other work kept the machine at a load of {load:.0f}, so only CPU time is compared;"
            " it varies more than on a quiet machine."
        )
    return text


def _all_repeats(document: Document) -> int:
    return 1 + max(result.repeat for result in document.results)


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
    chat = "chat, " if view.kind is Kind.CHAT else ""
    return Table(
        title=f"{chat}{clients} client{'s' * (clients > 1)}".capitalize(),
        columns=columns,
        rows=[_decode_row(view, name) for name in view.servers],
    )


def _decode_row(view: View, name: str) -> list[str]:
    rows = view.of(name)
    return [
        name,
        number(view.median(name, lambda row: row.speed), 1),
        number(view.ratio(view.document.base, name), 2, unit=" x"),
        number(view.of_roof(name), 2),
        number(1e3 * view.median(name, lambda row: row.summary.time_to_first_p50)),
        number(1e3 * view.median(name, lambda row: row.summary.time_per_token_p50), 1),
        number(1e3 * view.median(name, lambda row: row.summary.gap_p50), 1),
        number(1e3 * view.median(name, lambda row: row.summary.gap_p99), 1),
        _failed(rows),
        number(view.median(name, lambda row: row.server_cpu), 1),
        number(view.median(name, lambda row: row.rss_peak) / 1e6),
        number(view.median(name, lambda row: row.client_cpu / row.summary.wall), 2),
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
                number(view.median(name, lambda row: row.speed)),
                number(view.ratio(document.base, name), 2, unit=" x"),
                number(view.of_roof(name), 2),
                number(1e3 * view.median(name, lambda row: row.summary.time_to_first_p50)),
                _failed(view.of(name)),
                number(view.median(name, lambda row: row.start_seconds), 1),
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
                number(goodput(document, name), 1),
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
                *(number(view.median(name, lambda row: row.speed), 1) for name in
                  (_EMBEDDED, _REDIS)),
                number(100 * (1 - view.ratio(_REDIS, _EMBEDDED)), unit=" %"),
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
    rows = [[f"M = {view.level:g}", number(median(view.roofs_of(document.base)))] for view in views]
    prefill = prefill_view(document)
    rows.append([f"prefill of {prefill.level:g}", number(median(prefill.roofs_of(document.base)))])
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
