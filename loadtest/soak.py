"""Soak: a test cluster under load and random faults for minutes or hours; no loss, no leak.

    python -m loadtest.soak --minutes 10 --seed 1
    python -m loadtest.soak --minutes 10 --model real

Real processes: Redis, API replicas, engines. Clients read, disconnect, resume, cancel and read
slowly while replicas are killed, stopped and replaced and Redis pauses. Every output is compared,
token by token, with the expected one: the oracle's, which follows from the request alone, or, with
a real model, that of an undisturbed run. At the end it prints the faults, the fate of every request
and the resources of the oldest processes and Redis, compared with those after the warm-up. It exits
with 1 if a promise was broken. A seed reproduces the faults; which requests they hit depends on
timing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from model.checkpoint.fetch import default_cache, resolve
from tests.cluster.client import Transcript
from tests.cluster.cluster import Cluster, Timings
from tests.cluster.processes import ForkServer
from tests.cluster.soak import Notify, Report, run_soak
from tests.cluster.soak_clients import Body, Expected

APIS, ENGINES, MAX_SEQUENCES = 2, 3, 6
GRACE = 10.0  # seconds that an abandoned stream continues; longer than an API replica is stopped
WINDOW = 20.0  # seconds that Redis keeps an ended response
POOL = 24  # different requests to a real model


async def undisturbed(cluster: Cluster, bodies: Sequence[Body]) -> Expected:
    """The outputs of a real model without faults."""
    reference: dict[int, list[int]] = {}
    for body in bodies:
        transcript: Transcript = await cluster.client.stream(body)
        if transcript.finish_reason != "length":
            raise RuntimeError(f"a request failed without faults: {transcript.error}")
        reference[body["seed"]] = transcript.tokens
    return lambda body: reference[body["seed"]]


async def soak(cluster: Cluster, options: argparse.Namespace, *, notify: Notify) -> Report:
    rng = random.Random(options.seed)

    def make_body() -> Body:
        return cluster.body(rng, max_tokens=rng.randint(1, 120))

    expected: Expected = cluster.expected
    if options.model == "real":
        pool = [make_body() for _ in range(POOL)]
        expected = await undisturbed(cluster, pool)

        def make_body() -> Body:
            return dict(rng.choice(pool))

    # What a request leaves is known for WINDOW seconds: those before the soak must not count.
    await asyncio.to_thread(cluster.reset)
    return await run_soak(
        cluster, make_body, expected, minutes=options.minutes, rng=rng, notify=notify
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Long load with random faults.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=("oracle", "real"), default="oracle")
    parser.add_argument("--lease", type=float, default=1.5, help="seconds")
    options = parser.parse_args(arguments)
    started = time.monotonic()

    def notify(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:6.0f} s: {text}\n")

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quire-soak-")))
        fork_server = None
        if options.model == "oracle":
            fork_server = ForkServer(folder)
            stack.callback(fork_server.close)
        cluster = Cluster(
            folder,
            resolve("", cache=default_cache()),
            fork_server=fork_server,
            timings=Timings(lease=options.lease, pace=0.02, grace=GRACE, window=WINDOW),
            num_engines=ENGINES,
            num_apis=APIS,
            max_sequences=MAX_SEQUENCES,
            engine_flags={"threads": 1, "kv-memory": "16MiB"},
        )
        stack.callback(cluster.close)
        cluster.start()
        report = asyncio.run(soak(cluster, options, notify=notify))
    print("\n".join(report.lines()))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
