"""Overload: ten times a server's capacity, or one tenant that floods it. Prints a table.

    python -m loadtest.overload                    # ten times the capacity
    python -m loadtest.overload --scene tenants    # one tenant floods, another sends few requests

The server is `quire serve` with the default model, on this machine; the clients use part of it, and
each rejection costs both sides CPU time. The first scene runs with a small batch and a short queue.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.load import first_model, served
from service.bench.client import Outcome, Target, arrive, complete, drive, percentile
from service.bench.workloads import make_prompts, poisson_arrivals

TOKENS_IN, TOKENS_OUT = 32, 64
MAX_SEQUENCES, MAX_QUEUED = 16, 16  # small, so that requests wait briefly
TIMES = 10  # arrival rate, in multiples of the capacity
PROBE_EVERY = 0.25  # seconds between the small requests that detect recovery
PROBES = 40
RECOVERED = 2.0  # recovered: time to first token below this multiple of the idle one
FLOOD = 96  # clients of the flooding tenant, more than the batch holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Results as printed."""

    title: str
    rows: Sequence[tuple[str, str, str]]  # figure, measured, required

    def table(self) -> str:
        lines = [f"| {self.title} | measured | required |", "| --- | ---: | ---: |"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])


def complete_ones(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those without an error."""
    return [outcome for outcome in outcomes if outcome.error is None]


def goodput(outcomes: Sequence[Outcome], *, since: float, seconds: float) -> float:
    """Complete responses per second that ended within this time."""
    ended = [each for each in complete_ones(outcomes) if since <= each.ended <= since + seconds]
    return len(ended) / seconds


def recovery(probes: Sequence[Outcome], *, since: float, idle: float) -> float:
    """Seconds from `since` to the first probe after which all are about as fast as when idle."""
    late = [
        index
        for index, probe in enumerate(probes)
        if probe.error is not None or probe.time_to_first > RECOVERED * idle
    ]
    first = max(late, default=-1) + 1
    return probes[first].sent - since if first < len(probes) else math.inf


async def overload(target: Target, *, seconds: float) -> Scene:
    """Capacity by a closed loop, ten times that as Poisson arrivals, then probes for recovery."""
    quiet = await _probe(target, "idle", count=PROBES // 4)
    idle = percentile([each.time_to_first for each in complete_ones(quiet)], 90)
    began = time.monotonic()
    prompts = make_prompts("capacity", count=10_000, num_tokens=TOKENS_IN)
    filling = drive(
        target, _until(began + seconds, prompts), clients=MAX_SEQUENCES + 4, max_tokens=TOKENS_OUT
    )
    capacity = goodput((await filling)[0], since=began, seconds=seconds)
    times = poisson_arrivals("overload", rate=TIMES * capacity, window=seconds)
    prompts = make_prompts("overload", count=len(times), num_tokens=TOKENS_IN)
    began = time.monotonic()
    arriving = asyncio.create_task(
        arrive(target, prompts, times=times, max_tokens=TOKENS_OUT, patience=30)
    )
    await asyncio.sleep(began + seconds - time.monotonic())
    over = time.monotonic()
    after = await _probe(target, "after", count=PROBES)
    outcomes, _ = await arriving
    rejected = [each for each in outcomes if each.rejection is not None]
    took = [each.ended - each.sent for each in rejected]
    good = goodput(outcomes, since=began, seconds=seconds)
    others = len(outcomes) - len(complete_ones(outcomes)) - len(rejected)
    hints = sum(
        each.rejection is not None and bool(each.rejection.retry_after) for each in rejected
    )
    share = good / capacity if capacity else math.nan
    return Scene(
        title=f"{TIMES} x capacity for {seconds:g} s",
        rows=[
            ("capacity, responses/s", f"{capacity:.1f}", ""),
            ("arrivals/s", f"{len(times) / seconds:.1f}", ""),
            (
                "responses, rejections, failures",
                f"{len(complete_ones(outcomes))}, {len(rejected)}, {others}",
                "0 failures",
            ),
            ("goodput, responses/s", f"{good:.1f}", ""),
            ("goodput / capacity", f"{share:.0%}", "90 %"),
            ("rejections by status", _statuses(rejected), ""),
            ("rejections with Retry-After", f"{hints / max(1, len(rejected)):.0%}", "100 %"),
            ("time to reject, p50", f"{1e3 * percentile(took, 50):.0f} ms", ""),
            ("time to reject, p95", f"{1e3 * percentile(took, 95):.0f} ms", "50 ms"),
            ("TTFT when idle, p90", f"{1e3 * idle:.0f} ms", ""),
            ("recovered after", f"{recovery(after, since=over, idle=idle):.1f} s", "5 s"),
        ],
    )


def _statuses(rejected: Sequence[Outcome]) -> str:
    statuses = [each.rejection.status for each in rejected if each.rejection]
    return ", ".join(f"{statuses.count(status)} x {status}" for status in sorted(set(statuses)))


def _until(end: float, prompts: Sequence[str]) -> Iterator[str]:
    for prompt in prompts:
        if time.monotonic() >= end:
            return
        yield prompt


async def _probe(target: Target, seed: str, *, count: int) -> list[Outcome]:
    """Small requests at a constant rate."""
    prompts = make_prompts(seed, count=count, num_tokens=TOKENS_IN)
    times = [PROBE_EVERY * index for index in range(count)]
    outcomes, _ = await arrive(target, prompts, times=times, max_tokens=4, patience=30)
    return outcomes


async def tenants(flooding: Target, other: Target, *, seconds: float) -> Scene:
    """One tenant sends few requests, first alone, then while another floods."""
    alone = await _one_by_one(other, "alone", seconds=seconds)
    end = time.monotonic() + seconds
    prompts = _until(end, make_prompts("flood", count=100_000, num_tokens=TOKENS_IN))
    flood = asyncio.create_task(
        drive(
            flooding, prompts, clients=FLOOD, max_tokens=TOKENS_OUT,
            pause=lambda outcome: 0.05 if outcome.rejection else 0.0,
        )
    )  # fmt: skip
    await asyncio.sleep(seconds / 5)  # so that the flood has begun
    during = await _one_by_one(other, "during", seconds=seconds * 4 / 5)
    flooded, _ = await flood
    calm, busy = ([each.time_to_first for each in complete_ones(each)] for each in (alone, during))
    ratio = percentile(busy, 99) / percentile(calm, 99)
    rejected = sum(each.rejection is not None for each in flooded)
    return Scene(
        title=f"one tenant floods for {seconds:g} s with {FLOOD} clients",
        rows=[
            ("its responses, rejections", f"{len(complete_ones(flooded))}, {rejected}", ""),
            ("the other's responses", f"{len(complete_ones(during))} of {len(during)}", "all"),
            ("TTFT alone, p50", f"{1e3 * percentile(calm, 50):.0f} ms", ""),
            ("TTFT alone, p99", f"{1e3 * percentile(calm, 99):.0f} ms", ""),
            ("TTFT during the flood, p50", f"{1e3 * percentile(busy, 50):.0f} ms", ""),
            ("TTFT during the flood, p99", f"{1e3 * percentile(busy, 99):.0f} ms", ""),
            ("p99 during / alone", f"{ratio:.1f}", "2"),
        ],
    )


async def _one_by_one(target: Target, seed: str, *, seconds: float) -> list[Outcome]:
    """One request after another, with pauses."""
    prompts = make_prompts(seed, count=10_000, num_tokens=TOKENS_IN)
    outcomes, _ = await drive(
        target, _until(time.monotonic() + seconds, prompts), clients=1, max_tokens=8, timeout=60,
        pause=lambda _: PROBE_EVERY / 2,
    )  # fmt: skip
    return outcomes


@contextmanager
def started(*flags: str, keys: Sequence[str] = ()) -> Iterator[Target]:
    """A server with these API keys."""
    with tempfile.TemporaryDirectory(prefix="quire-overload-") as name:
        folder = Path(name)
        if keys:
            path = folder / "keys.toml"
            path.write_text("".join(_entry(f"tenant-{i}", key) for i, key in enumerate(keys)))
            flags += ("--keys-file", str(path))
        with served("", folder, flags=flags) as url:
            model = first_model(url, keys[0] if keys else "")
            port = urlsplit(url).port or 0
            usage = {"include_usage": True}
            fields = {"model": model, "ignore_eos": True, "stream_options": usage}
            yield Target(port=port, fields=fields)


def _entry(name: str, secret: str) -> str:
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return f"[[keys]]\nname = {json.dumps(name)}\nsha256 = {json.dumps(digest)}\n"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Overload a server.")
    parser.add_argument("--scene", choices=("overload", "tenants"), default="overload")
    parser.add_argument("--seconds", type=float, default=20, help="duration of each part")
    parser.add_argument("flags", nargs="*", help="flags of `quire serve`, after --")
    options = parser.parse_args(arguments)
    sizes: tuple[str, ...] = ()
    if options.scene == "overload":
        sizes = ("--max-sequences", str(MAX_SEQUENCES), "--max-queued-requests", str(MAX_QUEUED))
        keys = []
    else:  # default sizes: the flood would fill a short queue for all tenants
        keys = [f"qk-{secrets.token_urlsafe(24)}" for _ in range(2)]
    with started(*sizes, *options.flags, keys=keys) as target:
        print(asyncio.run(_play(target, keys, seconds=options.seconds)).table())
    return 0


async def _play(target: Target, keys: Sequence[str], *, seconds: float) -> Scene:
    """Runs the scene after one request to warm up; two keys mean two tenants."""
    targets = [replace(target, key=key) for key in keys] or [target]
    await complete(targets[0], "warm up", max_tokens=8)
    if len(targets) == 1:
        return await overload(targets[0], seconds=seconds)
    flooding, other = targets
    return await tenants(flooding, other, seconds=seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
