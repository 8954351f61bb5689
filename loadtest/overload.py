"""Overload: ten times what a server can do, and one tenant that floods it. Prints a table each.

    python -m loadtest.overload                    # ten times the capacity for a while
    python -m loadtest.overload --scene tenants    # one tenant floods, another asks now and then

The server is `quire serve` with the default model, on this machine beside the clients, which take
a part of it: ten times the capacity is mostly refusals, and these cost both sides something.
For the first scene its batch and queue are short, so that nobody waits for long.
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

from loadtest.client import Outcome, Target, arrive, complete, drive, percentile
from loadtest.load import first_model, served
from loadtest.workloads import make_prompts, poisson_arrivals

TOKENS_IN, TOKENS_OUT = 32, 64
MAX_SEQUENCES, QUEUE = (
    16,
    16,
)  # sequences in the batch, requests that may wait: short, for a short wait
TIMES = 10  # the capacity
PROBE_EVERY = 0.25  # seconds between requests that look whether it has recovered
PROBES = 40
RECOVERED = 2.0  # times the calm time to the first token
FLOOD = 96  # clients of the tenant that floods: more than the batch has room for


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A table of what was seen: names and figures as they are printed."""

    title: str
    rows: Sequence[tuple[str, str, str]]  # figure, seen, promised

    def table(self) -> str:
        """Markdown."""
        lines = [f"| {self.title} | seen | promised |", "| --- | ---: | ---: |"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])


def whole(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that got all they asked for."""
    return [outcome for outcome in outcomes if outcome.error is None]


def goodput(outcomes: Sequence[Outcome], *, since: float, seconds: float) -> float:
    """Whole answers a second, of those that ended in this time."""
    ended = [each for each in whole(outcomes) if since <= each.ended <= since + seconds]
    return len(ended) / seconds


def recovery(probes: Sequence[Outcome], *, since: float, calm: float) -> float:
    """Seconds until the first probe was sent from which on all are as fast as when it was calm."""
    late = [
        index
        for index, probe in enumerate(probes)
        if probe.error is not None or probe.time_to_first > RECOVERED * calm
    ]
    first = max(late, default=-1) + 1
    return probes[first].sent - since if first < len(probes) else math.inf


async def overload(target: Target, *, seconds: float) -> Scene:
    """Row 34: capacity by a closed loop, ten times of it by arrivals, then a look at the calm."""
    quiet = await _probe(target, "calm", count=PROBES // 4)
    calm = percentile([each.time_to_first for each in whole(quiet)], 90)
    began = time.perf_counter()
    prompts = make_prompts("capacity", count=10_000, num_tokens=TOKENS_IN)
    filling = drive(
        target, _until(began + seconds, prompts), clients=MAX_SEQUENCES + 4, max_tokens=TOKENS_OUT
    )
    capacity = goodput((await filling)[0], since=began, seconds=seconds)
    times = poisson_arrivals("overload", rate=TIMES * capacity, window=seconds)
    prompts = make_prompts("overload", count=len(times), num_tokens=TOKENS_IN)
    began = time.perf_counter()
    arriving = asyncio.create_task(
        arrive(target, prompts, times=times, max_tokens=TOKENS_OUT, patience=30)
    )
    await asyncio.sleep(began + seconds - time.perf_counter())
    over = time.perf_counter()
    after = await _probe(target, "after", count=PROBES)
    outcomes, _ = await arriving
    refused = [each for each in outcomes if each.refusal is not None]
    took = [each.ended - each.sent for each in refused]
    good = goodput(outcomes, since=began, seconds=seconds)
    others = len(outcomes) - len(whole(outcomes)) - len(refused)
    hints = sum(each.refusal is not None and bool(each.refusal.retry_after) for each in refused)
    share = good / capacity if capacity else math.nan
    return Scene(
        title=f"{TIMES} x capacity for {seconds:g} s",
        rows=[
            ("capacity, answers a second", f"{capacity:.1f}", ""),
            ("arrivals a second", f"{len(times) / seconds:.1f}", ""),
            (
                "answers, refusals, broken",
                f"{len(whole(outcomes))}, {len(refused)}, {others}",
                "0 broken",
            ),
            ("goodput, answers a second", f"{good:.1f}", ""),
            ("goodput of the capacity", f"{share:.0%}", "90 %"),
            ("refusals by status", _statuses(refused), ""),
            ("refusals with Retry-After", f"{hints / max(1, len(refused)):.0%}", "100 %"),
            ("a refusal, median", f"{1e3 * percentile(took, 50):.0f} ms", ""),
            ("a refusal, 95 %", f"{1e3 * percentile(took, 95):.0f} ms", "50 ms"),
            ("first token before, 90 %", f"{1e3 * calm:.0f} ms", ""),
            ("recovered after", f"{recovery(after, since=over, calm=calm):.1f} s", "5 s"),
        ],
    )


def _statuses(refused: Sequence[Outcome]) -> str:
    statuses = [each.refusal.status for each in refused if each.refusal]
    return ", ".join(f"{statuses.count(status)} x {status}" for status in sorted(set(statuses)))


def _until(end: float, prompts: Sequence[str]) -> Iterator[str]:
    for prompt in prompts:
        if time.perf_counter() >= end:
            return
        yield prompt


async def _probe(target: Target, seed: str, *, count: int) -> list[Outcome]:
    """Small requests at a steady pace, whatever becomes of those before."""
    prompts = make_prompts(seed, count=count, num_tokens=TOKENS_IN)
    times = [PROBE_EVERY * index for index in range(count)]
    outcomes, _ = await arrive(target, prompts, times=times, max_tokens=4, patience=30)
    return outcomes


async def tenants(flooding: Target, other: Target, *, seconds: float) -> Scene:
    """Row 35: one asks at leisure, alone and then while another floods."""
    alone = await _at_leisure(other, "alone", seconds=seconds)
    end = time.perf_counter() + seconds
    prompts = _until(end, make_prompts("flood", count=100_000, num_tokens=TOKENS_IN))
    flood = asyncio.create_task(_insist(flooding, prompts, clients=FLOOD, max_tokens=TOKENS_OUT))
    await asyncio.sleep(seconds / 5)  # the flood is there before the first is measured
    beside = await _at_leisure(other, "beside", seconds=seconds * 4 / 5)
    flooded = await flood
    calm, rough = ([each.time_to_first for each in whole(each)] for each in (alone, beside))
    ratio = percentile(rough, 99) / percentile(calm, 99)
    refused = sum(each.refusal is not None for each in flooded)
    return Scene(
        title=f"one tenant floods for {seconds:g} s with {FLOOD} clients",
        rows=[
            ("its answers, refusals", f"{len(whole(flooded))}, {refused}", ""),
            ("the other's answers", f"{len(whole(beside))} of {len(beside)}", "all"),
            ("first token alone, median", f"{1e3 * percentile(calm, 50):.0f} ms", ""),
            ("first token alone, 99 %", f"{1e3 * percentile(calm, 99):.0f} ms", ""),
            ("first token beside the flood, median", f"{1e3 * percentile(rough, 50):.0f} ms", ""),
            ("first token beside the flood, 99 %", f"{1e3 * percentile(rough, 99):.0f} ms", ""),
            ("99 %, times that alone", f"{ratio:.1f}", "2"),
        ],
    )


async def _at_leisure(target: Target, seed: str, *, seconds: float) -> list[Outcome]:
    """One after another, with pauses."""
    end, outcomes = time.perf_counter() + seconds, list[Outcome]()
    for prompt in make_prompts(seed, count=10_000, num_tokens=TOKENS_IN):
        if time.perf_counter() >= end:
            break
        outcomes.append(await complete(target, prompt, max_tokens=8, give_up_after=60))
        await asyncio.sleep(PROBE_EVERY / 2)
    return outcomes


async def _insist(
    target: Target, prompts: Iterator[str], *, clients: int, max_tokens: int
) -> list[Outcome]:
    """Each client asks again at once, answered or refused."""
    outcomes: list[Outcome] = []

    async def client() -> None:
        for prompt in prompts:
            outcomes.append(await complete(target, prompt, max_tokens=max_tokens))
            if outcomes[-1].refusal is not None:
                await asyncio.sleep(0.05)

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes


@contextmanager
def started(*flags: str, keys: Sequence[str] = ()) -> Iterator[Target]:
    """The server, with a key each."""
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
    """The command."""
    parser = argparse.ArgumentParser(description="Ten times the capacity; a tenant that floods.")
    parser.add_argument("--scene", choices=("overload", "tenants"), default="overload")
    parser.add_argument("--seconds", type=float, default=20, help="of each part")
    parser.add_argument("flags", nargs="*", help="of `quire serve`, after --")
    options = parser.parse_args(arguments)
    sizes: tuple[str, ...] = ()
    if options.scene == "overload":
        sizes = ("--max-sequences", str(MAX_SEQUENCES), "--max-queued-requests", str(QUEUE))
        keys = []
    else:  # the usual sizes: what is short, a flood fills for everybody
        keys = [f"qk-{secrets.token_urlsafe(24)}" for _ in range(2)]
    with started(*sizes, *options.flags, keys=keys) as target:
        print(asyncio.run(_play(target, keys, seconds=options.seconds)).table())
    return 0


async def _play(target: Target, keys: Sequence[str], *, seconds: float) -> Scene:
    """The scene with as many tenants as there are keys, after a first answer to warm up."""
    ours = [replace(target, key=key) for key in keys] or [target]
    await complete(ours[0], "the first", max_tokens=8)
    if len(ours) == 1:
        return await overload(ours[0], seconds=seconds)
    flooding, other = ours
    return await tenants(flooding, other, seconds=seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
