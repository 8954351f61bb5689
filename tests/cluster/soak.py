"""The run of a soak: warm-up, resource snapshot, load with random faults, resource snapshot."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.cluster.audit_log import IN_FLIGHT, AuditLog
from tests.cluster.checker import check_rest
from tests.cluster.cluster import Cluster
from tests.cluster.faults import Faults
from tests.cluster.resources import (
    ResourceSnapshot,
    leaks,
    snapshot_engine,
    snapshot_process,
    snapshot_redis,
)
from tests.cluster.soak_clients import Body, Expected, SoakClients

WIDTH = 12  # clients
WARM_UP = 0.1  # of the time, at most a minute: load without faults, before the first snapshot
PAUSE = (0.5, 3.0)  # seconds between faults
AUDIT_INTERVAL = 3.0  # seconds
SHOWN = 20  # maximum number of printed violations

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
            deaths = after.figures.get("deaths of engines", 0.0)
            if deaths > self._engine_faults:
                found.append(f"redis: {deaths:.0f} deaths kept after {self._engine_faults} faults")
        return found

    @property
    def _engine_faults(self) -> int:
        """Faults of engines, each of which may count as one death."""
        return sum(n for fault, n in self.faults.done.items() if fault.startswith("engine"))

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
    await asyncio.sleep(cluster.timings.window + 2)  # Redis drops ended responses
    engine, api = report.faults.engine, report.faults.api
    return [
        snapshot_process("engine", engine.pid),
        snapshot_engine("engine", await asyncio.to_thread(engine.metrics)),
        snapshot_process("API", api.pid),
        await asyncio.to_thread(snapshot_redis, cluster),
    ]
