"""Compares servers side by side on one machine: `python -m loadtest.compare --model FILE.gguf`.

Each repeat starts every server in turn (A B C, then C B A, ...), warms it up and drives it with the
same client and the same seeded prompts. Printed are medians over the repeats, and the median of the
ratios of a repeat, which is what counts on a machine whose speed changes. Everything measured goes
to a JSON file as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.client import Summary, complete, drive, summarise
from loadtest.servers import SERVERS, Plan, Running, Server, ServerFailed, running
from loadtest.workloads import make_prompts

_PACKAGES = ("quire-llm", "torch", "transformers", "xllamacpp")
_BUSY_CLIENT = 0.5  # of a core; above that the client may be what is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One server, one number of clients, one repeat."""

    server: str
    clients: int
    repeat: int
    summary: Summary
    server_cpu: float  # seconds
    client_cpu: float
    rss_peak: int  # bytes, since the server started
    start_seconds: float
    load_before: float  # the machine's, of the last minute: whether it had other work


async def _sampling_rss(server: Running) -> None:
    while True:
        server.sample_rss()
        await asyncio.sleep(0.5)


async def measure(
    server: Running, prompts: Sequence[str], *, clients: int, max_tokens: int
) -> tuple[Summary, float, float]:
    """Drives a warm server; the summary, its CPU seconds and the client's."""
    sampling = asyncio.create_task(_sampling_rss(server))
    before, own_before = server.cpu_seconds(), time.process_time()
    outcomes, wall = await drive(server.target, prompts, clients=clients, max_tokens=max_tokens)
    own, cpu = time.process_time() - own_before, server.cpu_seconds() - before
    sampling.cancel()
    return summarise(outcomes, wall=wall), cpu, own


def run_server(
    server: Server, plan: Plan, options: argparse.Namespace, *, repeat: int
) -> list[Result]:
    """One start of one server, with every number of clients. Raises ServerFailed."""
    results = []
    load_before = os.getloadavg()[0]
    with running(server, plan) as started:
        (warm_up,) = make_prompts("warm-up", count=1, num_tokens=options.tokens_in)
        asyncio.run(complete(started.target, warm_up, max_tokens=8))
        started.look_at_tree()
        for clients in options.clients:
            prompts = make_prompts(
                f"{options.seed}/{repeat}/{clients}",
                count=clients * options.requests,
                num_tokens=options.tokens_in,
            )
            summary, cpu, own = asyncio.run(
                measure(started, prompts, clients=clients, max_tokens=options.tokens_out)
            )
            results.append(
                Result(
                    server=server.name,
                    clients=clients,
                    repeat=repeat,
                    summary=summary,
                    server_cpu=cpu,
                    client_cpu=own,
                    rss_peak=started.rss_peak,
                    start_seconds=started.start_seconds,
                    load_before=load_before,
                )
            )
    return results


def compare(
    plan: Plan, options: argparse.Namespace, console: Console
) -> tuple[list[Result], dict[str, str]]:
    """All repeats of all servers; and the servers left out, with the reason."""
    skipped = {name: why for name in options.servers if (why := SERVERS[name].missing)}
    results: list[Result] = []
    for repeat in range(options.repeats):
        order = options.servers if repeat % 2 == 0 else options.servers[::-1]
        for name in order:
            if name in skipped:
                continue
            console.print(f"repeat {repeat + 1} of {options.repeats}: {name}", style="dim")
            try:
                results += run_server(SERVERS[name], plan, options, repeat=repeat)
            except ServerFailed as failure:
                skipped[name] = str(failure)
    return results, skipped


def ratios(results: Sequence[Result], base: str, name: str, clients: int) -> list[float]:
    """Tokens per second of `base` over those of `name`, for each repeat in which both had any."""
    speeds = {
        (result.server, result.repeat): result.summary.tokens_per_second
        for result in results
        if result.clients == clients
    }
    pairs = [
        (speed, speeds[name, repeat])
        for (server, repeat), speed in speeds.items()
        if server == base and (name, repeat) in speeds
    ]
    return [speed / other for speed, other in pairs if speed > 0 and other > 0]


def make_table(results: Sequence[Result], *, base: str) -> Table:
    """Medians over the repeats, one row a server and number of clients."""
    table = Table(title="Medians over the repeats; times in ms, RSS in MB")
    table.add_column("clients", justify="right")
    table.add_column("server", no_wrap=True)
    columns = ("tok/s", f"{base} is", "TTFT p50", "per token", "gap p50", "gap p99", "failures")
    for column in (*columns, "server CPU s", "RSS peak", "client core"):
        table.add_column(column, justify="right", no_wrap=True)
    for clients in sorted({result.clients for result in results}):
        for name in dict.fromkeys(result.server for result in results):
            rows = [row for row in results if (row.server, row.clients) == (name, clients)]
            if rows:
                table.add_row(
                    str(clients), name, *_cells(rows, ratios(results, base, name, clients))
                )
        table.add_section()
    return table


def _cells(rows: Sequence[Result], against: Sequence[float]) -> list[str]:
    """One row's figures; `against` are the base's ratios to it."""

    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    summaries = [row.summary for row in rows]
    failed, asked = sum(s.failures for s in summaries), sum(s.requests for s in summaries)
    return [
        f"{median([s.tokens_per_second for s in summaries]):.1f}",
        f"{median(against):.2f} x" if against else "",
        f"{1e3 * median([s.time_to_first_p50 for s in summaries]):.0f}",
        f"{1e3 * median([s.time_per_token_p50 for s in summaries]):.1f}",
        f"{1e3 * median([s.gap_p50 for s in summaries]):.1f}",
        f"{1e3 * median([s.gap_p99 for s in summaries]):.1f}",
        f"{failed}/{asked}",
        f"{median([row.server_cpu for row in rows]):.1f}",
        f"{median([row.rss_peak for row in rows]) / 1e6:.0f}",
        f"{median([row.client_cpu / row.summary.wall for row in rows]):.2f}",
    ]


def write_json(
    path: Path, results: Sequence[Result], skipped: dict[str, str], options: argparse.Namespace
) -> None:
    """All that was measured, and on what."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }
    document = {
        "machine": machine,
        "options": {name: str(value) for name, value in vars(options).items()},
        "skipped": skipped,
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; an unknown server's name ends it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file that all serve")
    parser.add_argument("--servers", type=lambda text: text.split(","), default=list(SERVERS))
    parser.add_argument("--clients", type=_numbers, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="of each client, one after another")
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--quire-flags", type=str.split, default=[], help="as one argument")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    if unknown := set(options.servers) - set(SERVERS):
        parser.error(f"no such server: {', '.join(sorted(unknown))} (known: {', '.join(SERVERS)})")
    return options


def main(arguments: Sequence[str]) -> int:
    """Runs the comparison; 1 where a request of the first server failed or nothing ran."""
    options = parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    options.results.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        model=options.model.resolve(),
        threads=options.threads,
        clients=max(options.clients),
        # A word may be more than one token, and a server may add one of its own.
        context=2 * options.tokens_in + options.tokens_out,
        folder=options.results,
        quire_flags=options.quire_flags,
    )
    results, skipped = compare(plan, options, console)
    console.print(make_table(results, base=options.servers[0]))
    for name, why in skipped.items():
        console.print(f"{name}: left out, {why}")
    for error in sorted({f"{row.server}: {e}" for row in results for e in row.summary.errors}):
        console.print(error, style="red", markup=False)
    if any(row.client_cpu > _BUSY_CLIENT * row.summary.wall for row in results):
        console.print("The client took over half a core: it may have been the limit.", style="red")
    path = options.results / time.strftime("compare-%Y%m%d-%H%M%S.json", time.gmtime())
    write_json(path, results, skipped, options)
    console.print(f"written: {path}")
    first = [row for row in results if row.server == options.servers[0]]
    return 0 if first and not any(row.summary.failures for row in first) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
