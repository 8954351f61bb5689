"""Kills engines at random moments, N times, while streams run, and checks every response.

    python -m tests.faults.kills --kills 3000 --lease 3

prints the failures and the distribution of the time from a kill to the next token of the affected
streams. The promised maximum is lease + 1.5 s. Zero failures in N kills bound the failure rate at
3 / N with 95 % confidence.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import pre_tokenizers

from tests.cluster.checker import check_rest, check_transcript
from tests.cluster.client import Transcript
from tests.cluster.cluster import Cluster, Timings
from tests.cluster.processes import ForkServer, Replica, wait_all_ready
from tests.cluster.streams import Streams
from tests.faults.oracle_model import write_model_of_oracle
from tests.support.tiny_model import build_tiny_model

ENGINES = 4
STREAMS = 8  # in flight at a time
MAX_SEQUENCES = 3  # of an engine, so that each has a part of them
KILLS_A_ROUND = 4
PROMISED_MARGIN = 1.5  # seconds over the lease
ROUNDS_BETWEEN_RESETS = 20  # Redis is emptied then


@dataclass
class Tally:
    """Kills and their results."""

    kills: int = 0
    hit: int = 0  # streams whose engine was killed
    responses: int = 0
    waits: list[float] = field(
        default_factory=list
    )  # seconds from a kill to the next token of a stream that it hit
    failures: list[str] = field(default_factory=list)
    deaths: Counter[int] = field(default_factory=Counter)  # responses by number of engine deaths

    def line(self, lease: float) -> str:
        return (
            f"{self.kills} kills hit {self.hit} of {self.responses} streams;"
            f" failures: {len(self.failures)};"
            f" failover p50 {quantile(self.waits, 0.5):.2f} s,"
            f" p99 {quantile(self.waits, 0.99):.2f} s, longest {max(self.waits, default=0):.2f} s;"
            f" promised {lease + PROMISED_MARGIN:.2f} s,"
            f" over it: {sum(w > lease + PROMISED_MARGIN for w in self.waits)};"
            f" responses by deaths: {dict(sorted(self.deaths.items()))}"
        )


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


async def run_kills(cluster: Cluster, rng: random.Random, *, kills: int) -> Tally:
    """Rounds of a few streams; each round kills and replaces some engines."""
    tally = Tally()
    rounds = 0
    while tally.kills < kills:
        if rounds % ROUNDS_BETWEEN_RESETS == 0:
            cluster.reset()
        rounds += 1
        bodies = [cluster.body(rng, max_tokens=rng.randint(60, 120)) for _ in range(STREAMS)]
        streams = Streams(cluster.client, bodies)
        await streams.wait_started(1)
        for _ in range(min(KILLS_A_ROUND, kills - tally.kills)):
            await asyncio.sleep(rng.random() * 0.4)
            kill_one(cluster, rng, streams, tally)
        await asyncio.to_thread(wait_all_ready, cluster.engines)
        await streams.wait_ended()
        await _check(cluster, streams.transcripts, tally)
    return tally


def kill_one(cluster: Cluster, rng: random.Random, streams: Streams, tally: Tally) -> None:
    """Kills an engine that runs streams, replaces it, and records the streams that it hit."""
    held: dict[Replica, list[Transcript]] = {}
    for each in streams.transcripts:
        owner = None if each.ended else cluster.owner_of(each.call_id or "")
        if owner is not None:
            held.setdefault(owner, []).append(each)
    victims = [engine for engine in cluster.engines if engine in held]
    if not victims:
        return
    victim = rng.choice(victims)
    victim.kill()
    killed = time.monotonic()
    hit = [(each, cluster.journalled(each.call_id or "")) for each in held[victim]]
    cluster.replace(victim)
    tally.kills += 1
    tally.hit += len(hit)
    streams.on_end(lambda: tally.waits.extend(_waits(hit, since=killed)))


def _waits(hit: Sequence[tuple[Transcript, int]], *, since: float) -> list[float]:
    """Times to the first token that the killed engine had not journalled."""
    return [
        each.arrival_of(count) - since for each, count in hit if count < each.body["max_tokens"]
    ]


async def _check(cluster: Cluster, transcripts: Sequence[Transcript], tally: Tally) -> None:
    """P1, P2, P3 of each and P5 of all; records failures and continues."""
    for each in transcripts:
        tally.responses += 1
        tally.deaths[cluster.deaths(each.call_id or "")] += 1
        try:
            assert each.finish_reason == "length", f"ended by {each.finish_reason} {each.error}"
            await check_transcript(cluster, each, expected=cluster.expected, same_bytes=True)
        except AssertionError as failure:
            tally.failures.append(f"{each.call_id}: {failure!r}")
    try:
        await check_rest(cluster)
    except AssertionError as failure:
        tally.failures.append(repr(failure))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Kill engines and check every response.")
    parser.add_argument("--kills", type=int, default=3000)
    parser.add_argument("--lease", type=float, default=3.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="quire-kills-") as name:
        folder = Path(name)
        tiny = build_tiny_model(pre_tokenizers.Digits(individual_digits=True))
        model = write_model_of_oracle(tiny, folder / "model")
        fork_server = ForkServer(folder)
        cluster = Cluster(
            folder,
            model,
            fork_server=fork_server,
            timings=Timings(lease=options.lease),
            num_engines=ENGINES,
            max_sequences=MAX_SEQUENCES,
        )
        try:
            cluster.start()
            rng = random.Random(options.seed)
            tally = asyncio.run(run_kills(cluster, rng, kills=options.kills))
        finally:
            cluster.close()
            fork_server.close()
    sys.stdout.write("\n".join([*tally.failures, tally.line(options.lease), ""]))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
