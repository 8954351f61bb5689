"""A load test in one command: Locust's streaming users, headless, and a table of the results.

    python -m loadtest.load --users 16 --seconds 60 --shape spike --workload mixed
    HOST=http://127.0.0.1:8000 LOADTEST_KEYS=one,two python -m loadtest.load

Without a host it starts `quire serve` with the default model on a free port. It writes CSV and HTML
files and exits with 1 if a stream failed. Locust runs in its own process because it patches the
sockets of its process.
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
from service.bench.workloads import Workload

ROOT = Path(__file__).parent.parent
LOCUSTFILE = ROOT / "loadtest" / "locustfile.py"
KEYS = "LOADTEST_KEYS"  # environment variable: API keys, separated by commas
STOP_TIMEOUT = 60  # seconds for the last streams to end


class LocustFailed(Exception):
    """Locust itself failed; the message names its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Parameters of a load test."""

    users: int = 8
    seconds: int = 30
    shape: Shape = Shape.STEADY
    workload: Workload = Workload.MIXED
    tokens: int = 64
    think: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of Locust's statistics. Times in milliseconds."""

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
    """Locust's command line; `out` is the prefix of its files."""
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", host),
        *("--users", str(load.users), "--run-time", f"{load.seconds}s"),
        *("--stop-timeout", str(STOP_TIMEOUT), "--shape", load.shape, "--model", model),
        *("--workload", load.workload, "--tokens", str(load.tokens), "--think", str(load.think)),
        *("--csv", str(out), "--html", f"{out}.html", "--only-summary"),
    ]


def run_locust(command: Sequence[str], *, log: Path) -> int:
    """Returns 0, or 1 if a stream failed. Raises LocustFailed."""
    with log.open("wb") as output:
        ended = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False)
    if ended.returncode not in {0, 1}:
        raise LocustFailed(f"Locust ended with {ended.returncode}, see {log}")
    return ended.returncode


def read_rows(out: Path) -> list[Row]:
    """Locust's statistics without the total."""
    with out.with_name(f"{out.name}_stats.csv").open(newline="") as file:
        return [_row(line) for line in csv.DictReader(file) if line["Name"] != "Aggregated"]


def read_failures(out: Path) -> list[str]:
    """One line per failure: how often, which, why."""
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
    """Markdown; streams first, then their parts."""
    order = ("stream", "first token", "gap")
    lines = [
        "| ms | workload | count | failed | p50 | p95 | p99 | max | per second |",
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
    """The id of the first model of `/v1/models`."""
    key = keys.partition(",")[0]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urlopen(Request(f"{host}/v1/models", headers=headers), timeout=30) as reply:  # noqa: S310
        model: str = json.load(reply)["data"][0]["id"]
    return model


def serve_command(plan: Plan, port: int) -> list[str]:
    model = ["--model", str(plan.model)] if plan.model.name else []
    where = ["--port", str(port), "--admin-port", "0"]
    return [sys.executable, "-m", "service", "serve", *model, *where, *plan.quire_flags]


@contextmanager
def served(host: str, folder: Path, *, flags: Sequence[str] = ()) -> Iterator[str]:
    """The URL of the host, or without one of a `quire serve` started for the duration."""
    if host:
        yield host.rstrip("/")
        return
    # An empty path: the server uses its default model, threads and sizes.
    plan = Plan(
        model=Path(), threads=0, clients=0, context=0, folder=folder, quire_flags=tuple(flags)
    )
    server = Server(name="quire", command=serve_command, health="/health/ready")
    with running(server, plan) as started:
        yield f"http://127.0.0.1:{started.target.port}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Streaming load by Locust.")
    defaults = Load()
    parser.add_argument(
        "--host", default=os.environ.get("HOST", ""), help="URL; default: start a server"
    )
    parser.add_argument("--users", type=int, default=defaults.users)
    parser.add_argument("--seconds", type=int, default=defaults.seconds)
    parser.add_argument("--shape", type=Shape, choices=list(Shape), default=defaults.shape)
    parser.add_argument(
        "--workload", type=Workload, choices=list(Workload), default=defaults.workload
    )
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="tokens per response")
    parser.add_argument(
        "--think", type=float, default=defaults.think, help="mean seconds between requests"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/load"), help="prefix of the files"
    )
    options = vars(parser.parse_args(arguments))
    host, out = options.pop("host"), options.pop("out")
    load = Load(**options)
    out.parent.mkdir(parents=True, exist_ok=True)
    with served(host, out.parent) as url:
        model = first_model(url, os.environ.get(KEYS, ""))
        code = run_locust(locust_command(url, load, model=model, out=out), log=Path(f"{out}.log"))
    print(f"{load.users} users, {load.shape}, {load.workload}, {load.seconds} s\n")
    print(
        "\n".join([table(read_rows(out)), "", *read_failures(out), f"{out}_stats.csv, {out}.html"])
    )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
