"""Rows 15 to 17 under Locust: all replicas are replaced three times, no request fails."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loadtest.load import ROOT, Load, Row, locust_command, read_failures, read_rows
from service.bench.workloads import Workload
from tests.cluster.balancer import Balancer
from tests.cluster.checker import check_rest
from tests.cluster.cluster import Cluster, Timings

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

ROUNDS = 3
USERS = 4


@asynccontextmanager
async def locust(host: str, load: Load, *, model: str, out: Path) -> AsyncIterator[None]:
    """Runs Locust for the duration; at the end its users finish their requests."""
    log = out.with_suffix(".log")
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *locust_command(host, load, model=model, out=out),
            cwd=ROOT, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        yield
        assert process.returncode is None, log.read_text()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 90)


def streams(out: Path) -> Row | None:
    """Locust's row of complete responses so far."""
    if not out.with_name(f"{out.name}_stats.csv").exists():
        return None
    return next((row for row in read_rows(out) if row.kind == "stream"), None)


async def answered(out: Path, number: int) -> None:
    """Waits for this many further responses."""
    before = streams(out)
    wanted = number + (before.count if before else 0)
    async with asyncio.timeout(120):
        while (row := streams(out)) is None or row.count < wanted:
            await asyncio.sleep(0.2)


async def test_row_17_no_request_fails_while_everything_is_replaced(
    default_model: Path, tmp_path: Path
) -> None:
    """The default model; users that do not resume, behind a balancer that does not retry."""
    cluster = Cluster(
        tmp_path / "cluster",
        default_model,
        fork_server=None,
        timings=Timings(lease=3.0, drain=30.0),
        engine_flags={"threads": 1, "kv-memory": "32MiB"},
    )
    out = tmp_path / "load"
    load = Load(users=USERS, seconds=1000, tokens=40, workload=Workload.CHAT)
    try:
        await asyncio.to_thread(cluster.start)
        old = {replica.pid for replica in (*cluster.engines, *cluster.apis)}
        gone = list(old)
        async with (
            Balancer(cluster.addresses) as balancer,
            locust(balancer.url, load, model=default_model.name, out=out),
        ):
            await answered(out, USERS)
            for _ in range(ROUNDS):
                for replica in (*cluster.engines, *cluster.apis):
                    await cluster.roll(replica)
                await answered(out, USERS)
                gone += [each.pid for each in (*cluster.engines, *cluster.apis)]
            assert len(set(gone)) == 4 * (ROUNDS + 1), "everything was another process each time"
        rows = read_rows(out)
        assert read_failures(out) == []
        assert [row for row in rows if row.failures] == []
        whole = next(row for row in rows if row.kind == "stream")
        assert whole.count >= USERS * (ROUNDS + 1)
        assert cluster.accepted() >= whole.count
        assert sum(api.metric("quire_requests_lost_total") for api in cluster.apis) == 0
        await check_rest(cluster)
    finally:
        cluster.close()
