"""Engines that die, freeze, raise and leave: outputs continue with the same tokens.

The row numbers are those of the fault table in `README.md`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from itertools import pairwise

import httpx
import pytest

from service.queues.redis.scripts import load_scripts
from tests.cluster.checker import check_all
from tests.cluster.client import Transcript
from tests.cluster.cluster import Cluster
from tests.cluster.processes import Replica
from tests.cluster.streams import Streams, until
from tests.faults.proxy import FaultProxy
from tests.support.waiting import GENEROUS

pytestmark = pytest.mark.faults


async def owner(cluster: Cluster, call_id: str) -> Replica:
    """Waits until an engine runs the request; returns it."""
    await until(lambda: cluster.owner_of(call_id), "an engine runs the request")
    found = cluster.owner_of(call_id)
    assert found is not None
    return found


def longest_wait(streams: Streams, held: list[int], *, counts: list[int], since: float) -> float:
    """Maximum time from a fault to the first new token, over the streams it hit."""
    return max(streams.transcripts[i].arrival_of(counts[i]) - since for i in held)


def longest_gap(transcript: Transcript) -> float:
    """Maximum time between two tokens."""
    times = [event.at for event in transcript.events if event.tokens]
    return max(later - earlier for earlier, later in pairwise(times))


def held_by(cluster: Cluster, engine: Replica, streams: Streams) -> list[int]:
    """Indices of the streams that an engine runs."""
    return [i for i, each in enumerate(streams.call_ids) if cluster.owner_of(each) is engine]


async def test_row_1_a_killed_engine_is_taken_over(cluster: Cluster, rng: random.Random) -> None:
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=300) for _ in range(8)])
    calls = await streams.wait_started()
    victim = await owner(cluster, calls[0])
    taken = held_by(cluster, victim, streams)
    victim.kill()
    killed = time.monotonic()
    counts = [cluster.journalled(each) for each in calls]
    await streams.wait_ended()
    assert all(cluster.deaths(calls[i]) == 1 for i in taken)
    assert await check_all(cluster, streams.transcripts) == {"length": 8}
    wait = longest_wait(streams, taken, counts=counts, since=killed)
    assert wait < GENEROUS * (cluster.timings.lease + 1.5)


async def test_row_2_killed_in_prefill(cluster: Cluster, rng: random.Random) -> None:
    hook = cluster.arm("kill")
    bodies = [cluster.body(rng), cluster.body(rng, hook=hook), cluster.body(rng)]
    streams = Streams(cluster.client, bodies)
    await streams.wait_ended()
    (dead,) = cluster.happened(hook)
    assert [engine.state for engine in cluster.engines if engine.pid == dead] == [""]
    assert cluster.deaths(streams.call_ids[1]) == 1
    assert await check_all(cluster, streams.transcripts) == {"length": 3}


async def test_row_3_killed_between_claim_and_work(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """The claim succeeded, but its reply did not reach the engine."""
    cluster = await asyncio.to_thread(own_cluster, num_engines=0)
    async with FaultProxy(cluster.redis.port) as proxy:
        engine = cluster.start_engine(queue=proxy.redis_url)
        await asyncio.to_thread(engine.wait_until_ready)
        await asyncio.to_thread(cluster.wait_until_registered, 1)
        engine.pause()  # so that its next claim finds the request
        streams = Streams(cluster.client, [cluster.body(rng)])
        await until(lambda: cluster.ask("HGET", cluster.key("adm"), "q") == "1", "it is queued")
        proxy.swallow_from = load_scripts()["claim"].sha.encode()
        engine.resume()
        await until(lambda: cluster.ask("HGET", cluster.key("adm"), "run") == "1", "a claim")
        assert proxy.swallowed
        engine.kill()
        await asyncio.to_thread(cluster.start_engine().wait_until_ready)
        await streams.wait_ended()
        assert cluster.deaths(streams.call_ids[0]) == 1
        assert cluster.state_of_request(streams.call_ids[0], "ep") == "2"
        assert await check_all(cluster, streams.transcripts) == {"length": 1}


async def test_row_6_all_engines_killed(cluster: Cluster, rng: random.Random) -> None:
    """Waiting requests are kept; those with a deadline end at it."""
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=300) for _ in range(4)])
    late = Streams(
        cluster.client,
        [cluster.body(rng, max_tokens=600) for _ in range(2)],
        x_request_timeout_ms="2500",
    )
    await streams.wait_started()
    await late.wait_started()
    for engine in cluster.engines:
        engine.kill()
    await late.wait_ended()
    assert all(each.finish_reason == "deadline" for each in late.transcripts)
    assert streams.num_ended == 0
    cluster.engines.clear()
    await asyncio.to_thread(cluster.start_engine().wait_until_ready)
    transcripts = await streams.wait_ended() + late.transcripts
    assert await check_all(cluster, transcripts) == {"length": 4, "deadline": 2}


async def test_row_7_the_engine_that_took_over_is_killed_too(
    cluster: Cluster, rng: random.Random
) -> None:
    """And the next ones: a request that makes progress survives any number of deaths. Nothing waits
    for an engine to start: the answer would end meanwhile.
    """
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=900)])
    (call,) = await streams.wait_started()
    for _ in range(5):
        victim = await owner(cluster, call)
        victim.kill()
        cluster.replace(victim)
        seen = int(cluster.state_of_request(call, "n"))
        await until(
            lambda: int(cluster.state_of_request(call, "n")) > seen + 2,  # noqa: B023
            "it goes on",
        )
    (transcript,) = await streams.wait_ended()
    assert cluster.deaths(call) == 5
    assert await check_all(cluster, [transcript]) == {"length": 1}


async def test_row_8_a_zombie_wakes_up(cluster: Cluster, rng: random.Random) -> None:
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=300) for _ in range(6)])
    calls = await streams.wait_started()
    zombie = await owner(cluster, calls[0])
    held = held_by(cluster, zombie, streams)
    zombie.pause()
    paused = time.monotonic()
    counts = [cluster.journalled(each) for each in calls]
    await until(
        lambda: all(cluster.state_of_request(calls[i], "ep") == "2" for i in held),
        "the others took over",
    )
    zombie.resume()
    stale = ("quire_fenced_writes_total", "quire_lost_leases_total")
    await until(lambda: sum(map(zombie.metric, stale)) > 0, "the zombie was refused")
    await streams.wait_ended()
    assert await check_all(cluster, streams.transcripts) == {"length": 6}
    wait = longest_wait(streams, held, counts=counts, since=paused)
    assert wait < GENEROUS * (cluster.timings.lease + 1.5)


async def test_row_9_an_engine_is_cut_off(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """It stops sampling when its lease expires, and serves again when reconnected."""
    cluster = await asyncio.to_thread(own_cluster, num_engines=0)
    async with FaultProxy(cluster.redis.port) as proxy:
        cut_off = cluster.start_engine(queue=proxy.redis_url)
        await asyncio.to_thread(cut_off.wait_until_ready)
        streams = Streams(cluster.client, [cluster.body(rng, max_tokens=600) for _ in range(4)])
        await streams.wait_started()
        proxy.black_hole = True
        await asyncio.sleep(3 * cluster.timings.lease)
        assert proxy.swallowed
        sampled = cut_off.metric("quire_generated_tokens_total")
        await asyncio.sleep(0.5)
        assert cut_off.metric("quire_generated_tokens_total") == sampled, "it still computes"
        assert cut_off.metric("quire_lost_leases_total") == 4
        other = cluster.start_engine()
        await asyncio.to_thread(other.wait_until_ready)
        await until(lambda: other.metric("quire_take_overs_total") == 4, "taken over")
        proxy.black_hole = False
        proxy.cut()
        await streams.wait_ended()
        events = 'quire_queue_events_total{event="outage"}'
        await until(lambda: cut_off.metric(events) >= 1, "it is back")
        other.terminate()
        assert await asyncio.to_thread(other.exit_code) == 0
        after = Streams(cluster.client, [cluster.body(rng)])
        await after.wait_ended()  # by the one that was cut off
        transcripts = streams.transcripts + after.transcripts
        assert await check_all(cluster, transcripts) == {"length": 5}


@pytest.mark.parametrize("action", ["raise", "out_of_memory"])
async def test_rows_10_and_11_a_step_raises(
    cluster: Cluster, rng: random.Random, action: str
) -> None:
    """After an error in the runner the process exits at once; others take over."""
    hook = cluster.arm(action)
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=60) for _ in range(4)])
    await streams.wait_started()
    bad = Streams(cluster.client, [cluster.body(rng, hook=hook)])
    await until(lambda: cluster.happened(hook), "the fault")
    (pid,) = cluster.happened(hook)
    (broken,) = (engine for engine in cluster.engines if engine.pid == pid)
    began = time.monotonic()
    assert await asyncio.to_thread(broken.exit_code) == 1
    assert time.monotonic() - began < GENEROUS * 1.0
    transcripts = await streams.wait_ended() + await bad.wait_ended()
    assert await check_all(cluster, transcripts) == {"length": 5}


async def test_row_12_poison_and_the_innocent(cluster: Cluster, rng: random.Random) -> None:
    hook = cluster.arm("exit", keep=True)
    async with cluster.kept_alive() as ended:
        streams = Streams(cluster.client, [cluster.body(rng, max_tokens=60) for _ in range(31)])
        await asyncio.sleep(0.2)
        poison = Streams(cluster.client, [cluster.body(rng, hook=hook)])
        (poisoned,) = await poison.wait_ended()
        await streams.wait_ended()
    assert poisoned.error == "engine_crash_loop"
    assert len(cluster.happened(hook)) == len(ended)
    assert 1 <= len(ended) <= 3
    reasons = await check_all(cluster, [poisoned, *streams.transcripts])
    assert reasons == {"length": 31, "error": 1}


async def test_row_13_another_numeric_class_does_not_go_on(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    cluster = await asyncio.to_thread(own_cluster, num_engines=1)
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=300)])
    (call,) = await streams.wait_started()
    cluster.engines.pop().kill()
    other = cluster.start_engine(numeric_class="another")
    await asyncio.to_thread(other.wait_until_ready)
    await asyncio.sleep(3 * cluster.timings.lease)
    assert cluster.state_of_request(call, "ep") == "1"
    assert streams.num_ended == 0
    await asyncio.to_thread(cluster.start_engine().wait_until_ready)
    await streams.wait_ended()
    assert other.metric("quire_generated_tokens_total") == 0
    assert await check_all(cluster, streams.transcripts) == {"length": 1}


async def test_an_engine_of_another_model_answers_nothing(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """It answered under the first model's name. What waits is answered by the next right engine,
    and the answer names its numeric class.
    """
    cluster = await asyncio.to_thread(own_cluster, num_engines=1)
    cluster.engines.pop().kill()
    host, port = cluster.apis[0].address("API")
    bodies = [cluster.body(rng) | {"stream": False} for _ in range(8)]
    async with httpx.AsyncClient(timeout=None, base_url=f"http://{host}:{port}") as client:
        calls = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
        queued = cluster.key("adm"), "q"
        await until(lambda: int(cluster.ask("HGET", *queued) or 0) == len(calls), "all are queued")
        other = cluster.start_engine(model_name="other", numeric_class="other")
        await asyncio.to_thread(other.wait_until_ready)
        await asyncio.sleep(3 * cluster.timings.lease)
        assert not any(call.done() for call in calls)
        right = cluster.start_engine(numeric_class="oracle-2")
        await asyncio.to_thread(right.wait_until_ready)
        for body, call in zip(bodies, calls, strict=True):
            answer = (await call).json()
            assert answer["system_fingerprint"] == "oracle-2"
            assert answer["choices"][0]["token_ids"] == cluster.expected(body)
    assert other.metric("quire_generated_tokens_total") == 0


async def test_row_16_an_engine_is_asked_to_leave(cluster: Cluster, rng: random.Random) -> None:
    """SIGTERM: the others continue at once, no death is counted, nothing fails."""
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=400) for _ in range(8)])
    calls = await streams.wait_started()
    leaving = await owner(cluster, calls[0])
    held = held_by(cluster, leaving, streams)
    leaving.terminate()
    sent = time.monotonic()
    assert await asyncio.to_thread(leaving.exit_code) == 0
    assert time.monotonic() - sent < GENEROUS * 5
    await streams.wait_ended()
    assert all(cluster.deaths(call) == 0 for call in calls)
    assert all(cluster.state_of_request(calls[i], "ep") == "2" for i in held)
    assert not any(each.refusals for each in streams.transcripts)
    assert await check_all(cluster, streams.transcripts) == {"length": 8}
    assert all(cluster.timings.lease > longest_gap(streams.transcripts[i]) for i in held)


async def test_row_33_the_kv_pool_is_too_small(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """All requests succeed: sequences are preempted and recomputed."""
    cluster = await asyncio.to_thread(own_cluster, num_engines=0)
    engine = cluster.start_engine(blocks=40, pace=0.001)
    await asyncio.to_thread(engine.wait_until_ready)
    bodies = [cluster.body(rng, max_tokens=rng.randint(20, 100)) for _ in range(24)]
    streams = Streams(cluster.client, bodies)
    await streams.wait_ended()
    assert engine.metric("quire_preemptions_total") > 0
    assert await check_all(cluster, streams.transcripts) == {"length": 24}
