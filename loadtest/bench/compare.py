"""Compares servers in turns on one machine: `python -m loadtest.bench.compare` (`make compare`).

Each repeat probes the roof, then starts every server in turn (A B C, then C B A, ...), warms it up
and measures it with the same client and the same seeded prompts. The speed of a machine changes, so
the result is the median of the ratios within a repeat. A server that cannot run is a row with the
reason. Writes compare.json (all measurements), compare.md (tables) and compare.svg; `--publish`
puts the tables of this kind of CPU into docs/benchmarks.md, `--readme` also the README's.

A repeat that would not end within `--minutes` is not started. Other work on the machine distorts
tokens per second, CPU seconds per token much less; the load average is in the JSON.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from loadtest.bench.chart import draw
from loadtest.bench.document import Document, read, write
from loadtest.bench.measure import Kind, Notify, Session, Sizes, TooSlow, better_threads
from loadtest.bench.peers import SERVERS
from loadtest.bench.publish import publish
from loadtest.bench.report import markdown, tables, warnings
from loadtest.bench.servers import Plan, Server, ServerFailed, convert, perplexity
from model.checkpoint import configure, open_checkpoint
from model.native.roof import NoRoof, count_weights, probe
from service.doctor.machine import this_machine

_CHART = Path(__file__).parents[1] / "chart.svg"  # the one that the README shows
_QUICK = Sizes(
    least=1, tokens_out=32, prefill_requests=1, chat_clients=(1, 8), chat_least=2, chat_tokens=64,
    rates=(2, 8), window=3.0, patience=20.0, tokens_out_arrivals=16,
)  # fmt: skip
_NOT_QUICK = (
    "quire-redis", "llama.cpp-q8_0", "openvino-q4_1",
    *(name for name, server in SERVERS.items() if server.once),
)  # fmt: skip
_VARIANTS = ("avx2",)


@dataclass(slots=True, kw_only=True)
class Comparison:
    """Runs servers in turn and collects the results in a document."""

    plan: Plan
    document: Document
    notify: Notify
    candidates: Sequence[int] = ()  # numbers of threads to try

    def run(self, *, repeats: int, minutes: float) -> None:
        """Runs at least one repeat, and no further one that would end too late."""
        began = time.monotonic()
        names = self._prepare_all()
        for number in range(repeats):
            before = time.monotonic()
            names = self._repeat(number, names, title=f"repeat {number + 1} of {repeats}")
            arrivals = sum(
                row.summary.wall
                for row in self.document.results
                if (row.repeat, row.kind) == (number, Kind.ARRIVALS)
            )
            now = time.monotonic()
            if now - began + (now - before - arrivals) > 60 * minutes:
                break

    def _prepare_all(self) -> list[str]:
        """Converts weights, tunes threads, measures quality. Returns the servers that can run."""
        for name in self.document.servers:
            self.notify(f"prepare · {name}")
            if name not in self.document.left_out and (reason := self._prepare(SERVERS[name])):
                self.document.left_out[name] = reason
        able = [name for name in self.document.servers if name not in self.document.left_out]
        self._measure_quality(able)
        return able

    def _measure_quality(self, names: Sequence[str]) -> None:
        """Once per command: the same weights in the same engine have one perplexity."""
        known: dict[tuple[str, ...], float] = {}
        for name in names:
            server = SERVERS[name]
            self.document.weight_bytes[name] = server.weight_bytes
            command = tuple(server.quality(self.plan)) if server.quality else ()
            try:
                if command not in known:
                    self.notify(f"perplexity · {name}")
                    known[command] = perplexity(server, self.plan)
            except ServerFailed as failure:
                self.document.left_out[f"perplexity of {name}"] = str(failure)
                known[command] = math.nan
            if not math.isnan(known[command]):
                self.document.perplexity[name] = known[command]

    def _prepare(self, server: Server) -> str | None:
        """Why this server is left out, or None."""
        if server.missing:
            return server.missing
        if self.plan.variant and self.plan.variant not in server.variants:
            return f"cannot be restricted to {self.plan.variant}"
        try:
            convert(server, self.plan)
            if server.tries_threads and len(self.candidates) > 1:
                best = better_threads(server, self.plan, candidates=self.candidates)
                self.document.threads[server.name] = best
        except (ServerFailed, TooSlow, OSError) as failure:
            return str(failure)
        return None

    def _repeat(self, number: int, names: Sequence[str], *, title: str) -> list[str]:
        """Measures every server once. Returns those to repeat, in the same order."""
        self._probe_roof()
        again = set()
        for name in names if number % 2 == 0 else names[::-1]:
            threads = self.document.threads.get(name, self.plan.threads)
            plan = replace(self.plan, threads=threads)
            session = Session(SERVERS[name], plan, self.document.sizes, repeat=number)
            if self._succeeds(session, label=f"{title} · {name}"):
                again.add(name)
            self.document.results.extend(session.results)
        return [name for name in names if name in again]

    def _succeeds(self, session: Session, *, label: str) -> bool:
        """Runs it. Returns whether everything succeeded and the server is to be repeated."""
        once = session.server.once
        try:
            session.run(
                with_arrivals=session.repeat == 0 and not once,
                notify=lambda load: self.notify(f"{label} · {load}"),
            )
        except (ServerFailed, TooSlow, OSError) as failure:
            reason = f"{failure} (in repeat {session.repeat + 1})"
            self.document.left_out[session.server.name] = reason
            return False
        return not once

    def _probe_roof(self) -> None:
        """Adds a roof, or the reason for its absence."""
        document = self.document
        try:
            threads = sorted({1, document.machine.cpus})
            document.roofs.append(probe(threads=threads, variant=self.plan.variant))
        except NoRoof as reason:
            document.left_out["roof"] = str(reason)


def _default_model() -> Path:
    """The file that `quire serve` serves, downloaded if necessary."""
    from model.checkpoint.fetch import default_cache, resolve

    return resolve("", cache=default_cache())


def _numbers(text: str) -> tuple[int, ...]:
    """Comma-separated; none if empty."""
    return tuple(int(part) for part in text.split(",") if part)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Exits for an unknown server name."""
    cpus = this_machine().cpus
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", type=Path, help="GGUF file (default: the default model)")
    add("--servers", type=lambda text: text.split(","), default=list(SERVERS))
    add("--quick", action="store_true", help="small loads, one repeat unless --repeats is given")
    add(
        "--variant",
        choices=_VARIANTS,
        default="",
        help="restrict all servers to these instructions",
    )
    add("--clients", type=_numbers)
    add("--chat-clients", type=_numbers)
    add("--tokens-in", type=int)
    add("--tokens-out", type=int)
    add(
        "--rates",
        type=_numbers,
        help="rising rates of the Poisson arrivals, in requests per second; empty: none",
    )
    add("--patience", type=float, help="seconds; a load that would take longer is skipped")
    add("--seed")
    add("--repeats", type=int)
    add(
        "--minutes",
        type=float,
        default=90,
        help="time limit; no repeat starts that would exceed it",
    )
    add("--threads", type=_numbers, default=tuple(sorted({max(1, cpus // 2), cpus})),
        help="numbers of threads to try for llama.cpp")  # fmt: skip
    add("--quire-flags", type=str.split, default=[], help="flags of `quire serve`, as one argument")
    add("--results", type=Path, default=Path("results"))
    add("--render", type=Path, metavar="JSON", help="tables and chart of an earlier compare.json")
    add("--publish", action="store_true", help="write this CPU's section of docs/benchmarks.md")
    add(
        "--readme", action="store_true", help=f"--publish, and the README's table and {_CHART.name}"
    )
    options = parser.parse_args(arguments)
    options.command = _command(arguments)
    if unknown := set(options.servers) - set(SERVERS):
        parser.error(f"no such server: {', '.join(sorted(unknown))} (known: {', '.join(SERVERS)})")
    return options


def _command(arguments: Sequence[str]) -> str:
    """What to enter for the same measurements; where they are written is left out."""
    words = list(arguments)
    if "--results" in words:
        place = words.index("--results")
        del words[place : place + 2]
    return f"make compare ARGS={shlex.quote(shlex.join(words))}"


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The preset with the overrides of the command line."""
    sizes = _QUICK if options.quick else Sizes()
    names = ("clients", "chat_clients", "tokens_in", "tokens_out", "rates", "patience", "seed")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return replace(sizes, **given)


def measure(options: argparse.Namespace, *, console: Console) -> Document:
    """Runs the comparison; after an interrupt, returns the results so far."""
    model, sizes = (options.model or _default_model()).resolve(), sizes_of(options)
    document = Document(
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        machine=this_machine(),
        model=model.name,
        weights=count_weights(configure(open_checkpoint(model))[1]),
        sizes=sizes,
        servers=options.servers,
        variant=options.variant,
        command=options.command,
    )
    if options.quick:
        slow = [name for name in _NOT_QUICK if name in options.servers]
        document.left_out |= dict.fromkeys(slow, "not with --quick")
    plan = Plan(
        model=model,
        threads=max(options.threads),
        clients=max(*sizes.clients, *sizes.chat_clients),
        context=sizes.context,
        folder=options.results.resolve(),
        quire_flags=options.quire_flags,
        variant=options.variant,
    )
    candidates = () if options.quick else options.threads
    repeats = options.repeats or (1 if options.quick else 3)
    with console.status("") as status:
        comparison = Comparison(
            plan=plan, document=document, notify=status.update, candidates=candidates
        )
        try:
            comparison.run(repeats=repeats, minutes=options.minutes)
        except KeyboardInterrupt:
            console.print("interrupted; showing the results so far", style="red")
    return document


def main(arguments: Sequence[str]) -> int:
    """Returns 1 if a request of the first server failed or nothing ran."""
    options = parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    options.results.mkdir(parents=True, exist_ok=True)
    if options.render:
        document = read(options.render)
    else:
        document = measure(options, console=console)
        write(document, options.results / "compare.json")
    if not document.results:
        console.print("no results:", document.left_out)
        return 1
    for table in tables(document):
        console.print(table.to_rich())
    for line in warnings(document):
        console.print(line, style="red", markup=False, highlight=False)
    report, chart = options.results / "compare.md", options.results / "compare.svg"
    report.write_text(markdown(document), encoding="utf-8")
    draw(document, chart)
    console.print(f"written: {report}, {chart}, compare.json")
    if options.publish or options.readme:
        publish(document, readme=options.readme)
    if options.readme:
        shutil.copyfile(chart, _CHART)
    judged = (Kind.DECODE, Kind.PREFILL)
    first = [row for row in document.results if row.server == document.base and row.kind in judged]
    return 0 if first and not any(row.summary.failures for row in first) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
