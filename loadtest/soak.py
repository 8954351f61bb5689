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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.checkpoint.fetch import default_cache, resolve
from tests.cluster.audit_log import IN_FLIGHT, AuditLog
from tests.cluster.checker import check_rest
from tests.cluster.client import Transcript
from tests.cluster.cluster import Cluster, Timings
from tests.cluster.faults import Faults
from tests.cluster.processes import ForkServer
from tests.cluster.resources import (
    ResourceSnapshot,
    leaks,
    snapshot_engine,
    snapshot_process,
    snapshot_redis,
)
from tests.cluster.soak_clients import Expected, SoakClients

APIS, ENGINES, MAX_SEQUENCES = 2, 3, 6
WIDTH = 12  # clients
WARM_UP = 0.1  # of the time, at most a minute: load without faults, before the first snapshot
PAUSE = (0.5, 3.0)  # seconds between faults
AUDIT_INTERVAL = 3.0  # seconds
GRACE = 10.0  # seconds that an abandoned stream continues; longer than an API replica is stopped
WINDOW = 20.0  # seconds that Redis keeps an ended response
SHOWN = 20  # maximum number of printed violations
POOL = 24  # different requests to a real model

Body = dict[str, Any]
Notify = Callable[[str], None]


@dataclass(kw_only=True)
class Report:
    """Results. `before` and `after`: snapshots of idle processes, after warm-up and at the end."""

    clients: SoakClients
    faults: Faults
    audit_log: AuditLog
    accepted: float = 0.0
    lost: float = 0.0
    before: Sequence[ResourceSnapshot] = ()
    after: Sequence[ResourceSnapshot] = ()
    cluster_failures: list[str] = field(default_factory=list)

    @property
    def violations(self) -> list[str]:
        """Broken promises."""
        tally = self.audit_log.tally()
        found = [*self.clients.violations, *self.cluster_failures]
        found += [f"vanished: {each}" for each in sorted(self.audit_log.vanished)]
        if tally[IN_FLIGHT]:
            found.append(f"{tally[IN_FLIGHT]} requests never ended")
        if tally["error"]:
            found.append(f"{tally['error']} requests failed")
        if self.lost:
            found.append(f"quire_requests_lost_total is {self.lost:.0f}")
        if self.accepted > tally.total():
            found.append(f"{self.accepted:.0f} accepted, {tally.total()} known")
        for before, after in zip(self.before, self.after, strict=True):
            found += leaks(before, after)
        return found

    def lines(self) -> list[str]:
        tally = dict(sorted(self.audit_log.tally().items()))
        found = self.violations
        requests = (
            f"requests: {sum(tally.values())} = {tally}; vanished {len(self.audit_log.vanished)},"
            f" lost {self.lost:.0f}; {self.accepted:.0f} accepted by API replicas that still run"
        )
        return [
            f"answers: {dict(self.clients.answers)}, {self.clients.tokens} tokens",
            f"faults: {dict(self.faults.done)}",
            requests,
            "",
            "| part | figure | after the warm-up | at the end |",
            "| --- | --- | ---: | ---: |",
            *(
                f"| {after.part} | {name} | {before.figures[name]:.1f} | {value:.1f} |"
                for before, after in zip(self.before, self.after, strict=True)
                for name, value in after.figures.items()
            ),
            "",
            *found[:SHOWN],
            f"violations: {len(found)}",
        ]


async def run_soak(
    cluster: Cluster,
    make_body: Callable[[], Body],
    expected: Expected,
    *,
    minutes: float,
    rng: random.Random,
    notify: Notify,
) -> Report:
    """Warm-up, snapshot, faults, snapshot. The cluster must be running and empty."""
    clients = SoakClients(cluster.client, make_body, expected, rng=rng)
    audit_log = AuditLog(cluster)
    report = Report(clients=clients, audit_log=audit_log, faults=Faults(cluster, rng))
    seconds = 60 * minutes
    warm_up = min(60.0, WARM_UP * seconds)
    async with _audited(report):
        async with _clients_running(clients):
            await asyncio.sleep(warm_up)
        report.before = await _snapshot_idle(cluster, report)
        async with _clients_running(clients):
            await _inject_faults(
                report, until=time.monotonic() + seconds - warm_up, rng=rng, notify=notify
            )
        report.after = await _snapshot_idle(cluster, report)
    report.accepted = await asyncio.to_thread(cluster.accepted)
    report.lost = sum(api.metric("quire_requests_lost_total") for api in cluster.apis)
    return report


@asynccontextmanager
async def _clients_running(clients: SoakClients) -> AsyncIterator[None]:
    """Runs clients; at the end, lets them finish their requests."""
    stop = asyncio.Event()
    running = [asyncio.create_task(clients.run(stop)) for _ in range(WIDTH)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*running)


@asynccontextmanager
async def _audited(report: Report) -> AsyncIterator[None]:
    """Updates the audit log periodically."""

    async def keep() -> None:
        while True:
            await asyncio.to_thread(report.audit_log.update)
            await asyncio.sleep(AUDIT_INTERVAL)

    keeping = asyncio.create_task(keep())
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await asyncio.to_thread(report.audit_log.update)


async def _inject_faults(
    report: Report, *, until: float, rng: random.Random, notify: Notify
) -> None:
    reported = time.monotonic()
    while time.monotonic() < until:
        await asyncio.sleep(rng.uniform(*PAUSE))
        try:
            await report.faults.inject()
        except AssertionError as failure:
            report.cluster_failures.append(f"during a fault: {failure}")
        if time.monotonic() - reported > 30:
            reported = time.monotonic()
            left = (until - reported) / 60
            notify(
                f"{report.clients.answers.total()} answers, {report.faults.done.total()} faults, "
                f"{len(report.clients.violations)} violations; {left:.1f} minutes to go"
            )


async def _snapshot_idle(cluster: Cluster, report: Report) -> list[ResourceSnapshot]:
    """Waits until no request is left, not even in Redis; then takes the snapshots."""
    try:
        await check_rest(cluster)
    except AssertionError as failure:
        report.cluster_failures.append(str(failure))
    await asyncio.to_thread(report.audit_log.update)
    await asyncio.sleep(WINDOW + 2)
    engine, api = report.faults.engine, report.faults.api
    return [
        snapshot_process("engine", engine.pid),
        snapshot_engine("engine", await asyncio.to_thread(engine.metrics)),
        snapshot_process("API", api.pid),
        await asyncio.to_thread(snapshot_redis, cluster),
    ]


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
        cluster.reset()
        report = asyncio.run(soak(cluster, options, notify=notify))
    print("\n".join(report.lines()))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
