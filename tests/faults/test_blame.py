"""Blame for dead engines: other requests survive any number of deaths, a request that kills its
engines fails after three, and a slow engine is not dead.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence

import pytest

from tests.cluster.checker import check_all
from tests.cluster.client import Transcript
from tests.cluster.cluster import Cluster
from tests.cluster.processes import Replica, wait_all_ready
from tests.cluster.streams import Streams, until
from tests.support.waiting import GENEROUS

pytestmark = pytest.mark.faults

LONG = 1000  # output tokens


def held_by(cluster: Cluster, streams: Streams) -> dict[Replica, list[Transcript]]:
    """Streams by running engine."""
    held: dict[Replica, list[Transcript]] = {}
    for each in streams.transcripts:
        owner = None if each.ended else cluster.owner_of(each.call_id or "")
        if owner is not None and owner.is_up:
            held.setdefault(owner, []).append(each)
    return held


def kill(
    cluster: Cluster, victim: Replica, held: Sequence[Transcript]
) -> Callable[[], list[float]]:
    """Kills an engine. Returns a function that returns the seconds to the next token of `held`."""
    victim.kill()
    killed = time.monotonic()
    counts = [(each, cluster.journalled(each.call_id or "")) for each in held]
    return lambda: [
        each.arrival_of(count) - killed
        for each, count in counts
        if count < each.body["max_tokens"]  # else only its end was missing
    ]


async def test_innocent_answers_survive_twenty_deaths(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """Every five seconds an engine that runs streams dies and is replaced. If replacing is slow
    here, fewer die before the first answer ends.
    """
    cluster = await asyncio.to_thread(own_cluster, num_engines=4, pace=0.1)
    bodies = [cluster.body(rng, max_tokens=LONG) for _ in range(12)]
    streams = Streams(cluster.client, bodies, patience=300.0)
    await streams.wait_started()
    kills = 0
    while kills < 20 and not streams.num_ended:
        held = await asyncio.to_thread(held_by, cluster, streams)
        if held:
            victim = rng.choice(list(held))
            await asyncio.to_thread(victim.kill)
            await asyncio.to_thread(cluster.replace, victim)
            kills += 1
        await asyncio.sleep(5)
    await streams.wait_ended()
    assert kills >= 5
    assert sum(cluster.deaths(call) for call in streams.call_ids) >= kills - 1
    assert await check_all(cluster, streams.transcripts) == {"length": 12}


@pytest.mark.parametrize("apart", [0.0, 0.5, 2.0, 8.0])
async def test_two_engines_of_four_die_close_together(
    own_cluster: Callable[..., Cluster], rng: random.Random, apart: float
) -> None:
    """The second engine had taken over requests of the first, if there was time. Neither these
    requests nor new ones wait long.
    """
    # Two engines can run all streams, one cannot.
    cluster = await asyncio.to_thread(own_cluster, num_engines=4, max_sequences=7, pace=0.02)
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=LONG) for _ in range(12)])
    await streams.wait_started()
    waits: list[float] = []
    for death in range(2):
        held = await asyncio.to_thread(held_by, cluster, streams)
        victim = max(held, key=lambda engine: len(held[engine]))
        later = await asyncio.to_thread(kill, cluster, victim, held[victim])
        streams.on_end(lambda later=later: waits.extend(later()))  # type: ignore[misc]
        fresh = Streams(cluster.client, [cluster.body(rng, max_tokens=20)])
        began = time.monotonic()
        await fresh.wait_ended()
        assert fresh.transcripts[0].arrival_of(0) - began < GENEROUS * 1.0
        if death == 0:
            await asyncio.sleep(apart)
    await streams.wait_ended()
    assert await check_all(cluster, streams.transcripts, counted=False) == {"length": 14}
    assert max(waits) < GENEROUS * (cluster.timings.lease + 1.5)


@pytest.mark.parametrize("position", [0, 1, 57])
async def test_a_request_that_kills_engines_at_one_position_is_failed_after_three(
    cluster: Cluster, rng: random.Random, position: int
) -> None:
    body = cluster.body(rng, max_tokens=90)
    hook = cluster.arm("exit", keep=True, at=(body["seed"], position))
    async with cluster.kept_alive() as ended:
        streams = Streams(cluster.client, [cluster.body(rng, max_tokens=400) for _ in range(31)])
        await streams.wait_started()
        poison = Streams(cluster.client, [body])
        (poisoned,) = await poison.wait_ended()
        await streams.wait_ended()
    assert poisoned.error == "engine_crash_loop"
    assert len(poisoned.tokens) <= position
    assert len(cluster.happened(hook)) == len(ended) == cluster.deaths(poison.call_ids[0]) == 3
    reasons = await check_all(cluster, [poisoned, *streams.transcripts])
    assert reasons == {"length": 31, "error": 1}


async def test_with_one_engine_others_go_on_beside_a_request_that_kills_it(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    cluster = await asyncio.to_thread(own_cluster, num_engines=1)
    body = cluster.body(rng, max_tokens=90)
    hook = cluster.arm("raise", keep=True, at=(body["seed"], 20))
    async with cluster.kept_alive() as ended:
        streams = Streams(cluster.client, [cluster.body(rng, max_tokens=300) for _ in range(6)])
        await streams.wait_started()
        (poisoned,) = await Streams(cluster.client, [body]).wait_ended()
        await streams.wait_ended()
    assert poisoned.error == "engine_crash_loop"
    assert len(cluster.happened(hook)) == len(ended) == 3
    reasons = await check_all(cluster, [poisoned, *streams.transcripts])
    assert reasons == {"length": 6, "error": 1}


async def test_frozen_engines_are_late_and_not_dead(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """Repeatedly, one or two of three engines are stopped for one to three leases."""
    cluster = await asyncio.to_thread(own_cluster, num_engines=3, pace=0.03)
    lease = cluster.timings.lease
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=LONG) for _ in range(12)])
    await streams.wait_started()
    for _ in range(10):
        frozen = rng.sample(cluster.engines, rng.choice((1, 1, 2)))
        for engine in frozen:
            await asyncio.to_thread(engine.pause)
        await asyncio.sleep(rng.uniform(1.0, 3.0) * lease)
        for engine in frozen:
            await asyncio.to_thread(engine.resume)
        await asyncio.sleep(rng.uniform(0.1, 1.0) * lease)
    await streams.wait_ended()
    late = ("quire_fenced_writes_total", "quire_lost_leases_total")  # whichever it meets first
    refused = sum(engine.metric(name) for engine in cluster.engines for name in late)
    assert refused > 0, "no engine was frozen for long enough"
    assert await check_all(cluster, streams.transcripts) == {"length": 12}


async def test_an_engine_whose_thread_hangs_lets_its_leases_run_out(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """Its event loop still runs, and must not renew leases of requests that do not progress."""
    cluster = await asyncio.to_thread(own_cluster, num_engines=2)
    body = cluster.body(rng, max_tokens=100)
    hook = cluster.arm(60.0, at=(body["seed"], 30))  # seconds that a step takes
    streams = Streams(cluster.client, [body])
    await until(lambda: cluster.happened(hook), "the fault")
    (pid,) = cluster.happened(hook)
    (hung,) = (engine for engine in cluster.engines if engine.pid == pid)
    await streams.wait_ended()
    assert hung.is_up
    assert await asyncio.to_thread(hung.is_live) is False
    assert cluster.deaths(streams.call_ids[0]) == 1
    hung.kill()
    await asyncio.to_thread(wait_all_ready, [cluster.replace(hung)])
    assert await check_all(cluster, streams.transcripts) == {"length": 1}
