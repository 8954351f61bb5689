"""Probes of real processes: saturated, hung, frozen, without Redis, draining.

Liveness depends on progress alone, readiness on whether requests can be accepted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import pytest

from service.bench.sse import Broken, call
from service.engine.timer import STALL_MAX
from tests.cluster.checker import check_all
from tests.cluster.cluster import Cluster
from tests.cluster.processes import Replica
from tests.cluster.streams import Streams
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.faults

PROBES = ("startup", "live", "ready")
UNANSWERED = 0


async def probe(replica: Replica, name: str, *, within: float = PATIENCE) -> int:
    """The status of a probe on the admin port, or UNANSWERED."""
    try:
        async with (
            asyncio.timeout(within),
            call(replica.address("metrics"), "GET", f"/health/{name}") as reply,
        ):
            return reply.status
    except (Broken, TimeoutError):
        return UNANSWERED


async def probes(replicas: Sequence[Replica]) -> list[list[int]]:
    """Of each: startup, live, ready."""
    return [[await probe(each, name) for name in PROBES] for each in replicas]


async def become(
    replica: Replica, name: str, status: int, *, seconds: float = 2 * PATIENCE
) -> None:
    async with asyncio.timeout(seconds):
        while await probe(replica, name) != status:
            await asyncio.sleep(0.1)


async def test_saturated_is_not_dead(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """Twenty times more requests than batch slots: all probes and all requests succeed."""
    cluster = await asyncio.to_thread(own_cluster, num_engines=1, num_apis=1, max_sequences=2)
    cluster.reset()
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=30) for _ in range(40)])
    (engine,), saturated = cluster.engines, 0
    while streams.num_ended < 40:
        assert await probes([*cluster.apis, engine]) == [[200] * 3] * 2
        saturated += engine.metric("quire_sequences_running") == 2
    assert saturated >= 3, "it was saturated while probed"
    await streams.wait_ended()
    assert await check_all(cluster, streams.transcripts) == {"length": 40}


async def test_an_engine_that_hangs_is_not_live(cluster: Cluster, rng: random.Random) -> None:
    """A step that does not end: only this engine's liveness fails; others continue."""
    hook = cluster.arm(10 * STALL_MAX)
    streams = Streams(cluster.client, [cluster.body(rng, hook=hook)])
    async with asyncio.timeout(PATIENCE):
        while not cluster.happened(hook):
            await asyncio.sleep(0.05)
    (pid,) = cluster.happened(hook)
    (hung,) = (each for each in cluster.engines if each.pid == pid)
    await become(hung, "live", 503, seconds=STALL_MAX + PATIENCE)
    others = [each for each in (*cluster.engines, *cluster.apis) if each is not hung]
    assert await probes(others) == [[200] * 3] * 3
    await streams.wait_ended()
    hung.kill()
    assert await check_all(cluster, streams.transcripts) == {"length": 1}


async def test_a_frozen_engine_does_not_respond_and_others_serve(
    cluster: Cluster, rng: random.Random
) -> None:
    frozen, other = cluster.engines
    frozen.pause()
    assert await probe(frozen, "live", within=2) == UNANSWERED
    assert await probes([*cluster.apis, other]) == [[200] * 3] * 3
    streams = Streams(cluster.client, [cluster.body(rng) for _ in range(4)])
    await streams.wait_ended()
    frozen.resume()
    await become(frozen, "ready", 200)
    assert await check_all(cluster, streams.transcripts) == {"length": 4}


async def test_without_redis_all_live_and_none_is_ready(cluster: Cluster) -> None:
    replicas = [*cluster.engines, *cluster.apis]
    cluster.redis.kill()
    for each in replicas:
        await become(each, "ready", 503)
    assert await probes(replicas) == [[200, 200, 503]] * 4
    await asyncio.to_thread(cluster.redis.start)
    for each in replicas:
        await become(each, "ready", 200)
    assert await probes(replicas) == [[200] * 3] * 4


@pytest.mark.parametrize("kind", ["api", "engine"])
async def test_a_draining_replica_is_not_ready_and_ends_in_time(
    cluster: Cluster, rng: random.Random, kind: str
) -> None:
    """SIGTERM under load: not ready at once, exit 0, and every response is complete."""
    leaving = (cluster.apis if kind == "api" else cluster.engines)[0]
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=100) for _ in range(8)])
    await streams.wait_started()
    cluster.excluded.add(leaving.pid)
    if kind == "api":
        cluster.count_before_end(leaving)
    leaving.terminate()
    async with asyncio.timeout(PATIENCE):
        while await probe(leaving, "ready") == 200:
            await asyncio.sleep(0.02)
    assert await asyncio.to_thread(leaving.exit_code) == 0
    await streams.wait_ended()
    assert await check_all(cluster, streams.transcripts) == {"length": 8}
