"""A load test in one command: Locust's streaming users, headless, and a table of what they saw.

    python -m loadtest.load --users 16 --seconds 60 --shape spike --workload mixed
    HOST=http://127.0.0.1:8000 LOADTEST_KEYS=one,two python -m loadtest.load

Without a host it starts `quire serve` with the default model on a free port and ends it. It writes
CSV and HTML, and is 1 where a stream failed. Locust runs in a process of its own, because it
replaces the sockets of the one it is in.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

from loadtest.bench.servers import Plan, Server, running
from loadtest.shapes import Shape
from loadtest.traffic import Workload

ROOT = Path(__file__).parent.parent
LOCUSTFILE = ROOT / "loadtest" / "locustfile.py"
KEYS = "LOADTEST_KEYS"  # the environment's name of the API keys, by commas
STOP_TIMEOUT = 60  # seconds that the last streams get to end


class LocustFailed(Exception):
    """Locust itself could not run; the message says where its log is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of a server."""

    users: int = 8
    seconds: int = 30
    shape: Shape = Shape.STEADY
    workload: Workload = Workload.MIXED
    tokens: int = 64
    think: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of Locust's statistics. Times in milliseconds."""

    kind: str  # stream, first token, gap
    name: str  # workload, and tenant
    count: int
    failures: int
    p50: float
    p95: float
    p99: float
    longest: float
    per_second: float


def locust_command(host: str, load: Load, *, model: str, out: Path) -> list[str]:
    """Locust's command line; its files begin with `out`."""
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", host),
        *("--users", str(load.users), "--run-time", f"{load.seconds}s"),
        *("--stop-timeout", str(STOP_TIMEOUT), "--shape", load.shape, "--model", model),
        *("--workload", load.workload, "--tokens", str(load.tokens), "--think", str(load.think)),
        *("--csv", str(out), "--html", f"{out}.html", "--only-summary"),
    ]


def run_locust(command: Sequence[str], *, log: Path) -> int:
    """0, or 1 where a stream failed. Raises LocustFailed where it did not run."""
    with log.open("wb") as output:
        ended = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False)
    if ended.returncode not in {0, 1}:
        raise LocustFailed(f"Locust ended with {ended.returncode}, see {log}")
    return ended.returncode


def read_rows(out: Path) -> list[Row]:
    """The statistics that Locust wrote, the sum over all of them left out."""
    with out.with_name(f"{out.name}_stats.csv").open(newline="") as file:
        return [_row(line) for line in csv.DictReader(file) if line["Name"] != "Aggregated"]


def read_faults(out: Path) -> list[str]:
    """What failed and how often, a line each."""
    with out.with_name(f"{out.name}_failures.csv").open(newline="") as file:
        lines = csv.DictReader(file)
        return [f"{line['Occurrences']} x {line['Name']}: {line['Error']}" for line in lines]


def _row(line: Mapping[str, str]) -> Row:
    def number(column: str) -> float:
        return float("nan") if line[column] == "N/A" else float(line[column])

    return Row(
        kind=line["Type"],
        name=line["Name"],
        count=int(line["Request Count"]),
        failures=int(line["Failure Count"]),
        p50=number("50%"),
        p95=number("95%"),
        p99=number("99%"),
        longest=number("Max Response Time"),
        per_second=number("Requests/s"),
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown; whole streams first."""
    order = ("stream", "first token", "gap")
    lines = [
        "| ms | of | number | failed | median | 95 % | 99 % | longest | a second |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: (order.index(row.kind), row.name)):
        times = " | ".join(f"{time:.0f}" for time in (row.p50, row.p95, row.p99, row.longest))
        lines.append(
            f"| {row.kind} | {row.name} | {row.count} | {row.failures} | {times}"
            f" | {row.per_second:.1f} |"
        )
    return "\n".join(lines)


def first_model(host: str, keys: str) -> str:
    """The id of the first model that a server names."""
    key = keys.partition(",")[0]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urlopen(Request(f"{host}/v1/models", headers=headers), timeout=30) as reply:  # noqa: S310
        model: str = json.load(reply)["data"][0]["id"]
    return model


def serve_command(plan: Plan, port: int) -> list[str]:
    """`quire serve`, as a user starts it."""
    model = ["--model", str(plan.model)] if plan.model.name else []
    where = ["--port", str(port), "--admin-port", "0"]
    return [sys.executable, "-m", "service", "serve", *model, *where, *plan.quire_flags]


@contextmanager
def served(host: str, folder: Path, *, flags: Sequence[str] = ()) -> Iterator[str]:
    """The host, or that of a server of one's own while this is entered."""
    if host:
        yield host.rstrip("/")
        return
    # The model's path is empty: the server takes its default. Threads and sizes are its own too.
    plan = Plan(
        model=Path(), threads=0, clients=0, context=0, folder=folder, quire_flags=tuple(flags)
    )
    server = Server(name="quire", command=serve_command, health="/health/ready")
    with running(server, plan) as started:
        yield f"http://127.0.0.1:{started.target.port}"


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Streaming load by Locust.")
    usual = Load()
    parser.add_argument("--host", default=os.environ.get("HOST", ""), help="without: its own")
    parser.add_argument("--users", type=int, default=usual.users)
    parser.add_argument("--seconds", type=int, default=usual.seconds)
    parser.add_argument("--shape", type=Shape, choices=list(Shape), default=usual.shape)
    parser.add_argument("--workload", type=Workload, choices=list(Workload), default=usual.workload)
    parser.add_argument("--tokens", type=int, default=usual.tokens, help="of an answer")
    parser.add_argument("--think", type=float, default=usual.think, help="seconds between answers")
    parser.add_argument("--out", type=Path, default=Path("results/load"), help="files begin so")
    options = vars(parser.parse_args(arguments))
    host, out = options.pop("host"), options.pop("out")
    load = Load(**options)
    out.parent.mkdir(parents=True, exist_ok=True)
    with served(host, out.parent) as url:
        model = first_model(url, os.environ.get(KEYS, ""))
        code = run_locust(locust_command(url, load, model=model, out=out), log=Path(f"{out}.log"))
    print(f"{load.users} users, {load.shape}, {load.workload}, {load.seconds} s\n")
    print("\n".join([table(read_rows(out)), "", *read_faults(out), f"{out}_stats.csv, {out}.html"]))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
