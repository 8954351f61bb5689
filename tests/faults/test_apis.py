"""API replicas that die or leave; clients that resume, disconnect, repeat a request or time out."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from service.bench.sse import Address, call
from service.messages import FinishReason
from tests.cluster.checker import check_all, check_rest, read_journal
from tests.cluster.client import Transcript
from tests.cluster.cluster import Cluster
from tests.cluster.processes import Replica, wait_all_ready
from tests.cluster.streams import ClosedLoop, Streams, until

pytestmark = pytest.mark.faults


def api_at(cluster: Cluster, address: Address) -> Replica:
    """The replica with this address."""
    return next(api for api in cluster.apis if api.address("API") == address)


async def state_of_end(cluster: Cluster, call_id: str) -> FinishReason:
    """Waits for a request's end and returns its finish reason."""
    await until(lambda: cluster.state_of_request(call_id, "st") == "ended", "it ends")
    _, end = await read_journal(cluster, call_id)
    return end.reason


async def test_row_14_a_killed_replica_is_left_for_another(
    cluster: Cluster, rng: random.Random
) -> None:
    """Clients resume with Last-Event-ID; requests without a reader are cancelled."""
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=100) for _ in range(6)])
    left = Streams(cluster.client, [cluster.body(rng, max_tokens=3000) for _ in range(2)])
    await streams.wait_started()
    left_calls = await left.wait_started()
    victim, survivor = cluster.apis
    victim.kill()
    await left.disconnect()
    await streams.wait_ended()
    moved = [each for each in streams.transcripts if each.connections > 1]
    assert moved
    assert survivor.is_up
    assert [await state_of_end(cluster, each) for each in left_calls] == ["cancelled"] * 2
    reasons = await check_all(cluster, streams.transcripts + left.transcripts, counted=False)
    assert reasons == {"length": 6, "cancelled": 2}


async def test_row_15_a_replica_is_asked_to_leave_under_load(
    cluster: Cluster, rng: random.Random
) -> None:
    """The balancer removes it first, as before a stop; open requests end, none fails."""
    leaving, _ = cluster.apis
    async with ClosedLoop(
        cluster.client, lambda: cluster.body(rng, max_tokens=50), width=8
    ) as load:
        await until(lambda: sum(each.ended for each in load.transcripts) >= 8, "load")
        await cluster.retire_api(leaving)
        await asyncio.sleep(0.5)
    assert not any(each.refusals for each in load.transcripts)
    assert all(each.connections == 1 for each in load.transcripts)
    assert await check_all(cluster, load.transcripts) == {"length": len(load.transcripts)}


@pytest.mark.parametrize("way", ["fin", "rst"])
@pytest.mark.parametrize("stream", [True, False])
async def test_row_18_a_client_leaves(
    cluster: Cluster, rng: random.Random, *, way: str, stream: bool
) -> None:
    body = cluster.body(rng, max_tokens=3000) | {"stream": stream}
    address = cluster.client.next_address()
    if stream:
        async with call(address, "POST", "/v1/completions", body=body) as reply:
            call_id = reply.headers["x-request-id"]
            async for event in reply.events():
                if event.tokens:
                    break
            if way == "rst":
                reply.reset()
    else:
        call_id = "s0-019000000000700080000000000000aa"
        leaving = asyncio.create_task(_post(address, body, call_id))
        await until(lambda: cluster.ask("KEYS", cluster.key("r:*")), "it is accepted")
        await until(lambda: _running(cluster) == 1, "it runs")
        (key,) = cluster.ask("KEYS", cluster.key("r:*"))
        call_id = key.removeprefix(cluster.key("r:")).removesuffix(".0")
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    assert await state_of_end(cluster, call_id) is FinishReason.CANCELLED
    await check_rest(cluster)
    tokens, _ = await read_journal(cluster, call_id)
    assert len(tokens) < 2900


def _running(cluster: Cluster) -> float:
    return sum(engine.metric("quire_sequences_running") for engine in cluster.engines)


async def _post(address: Address, body: dict[str, Any], call_id: str) -> None:
    headers = {"x-request-id": call_id}
    async with call(address, "POST", "/v1/completions", body=body, headers=headers) as reply:
        await reply.body()


async def test_row_20_two_readers_of_one_stream(cluster: Cluster, rng: random.Random) -> None:
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=80)])
    (call_id,) = await streams.wait_started(10)
    after = streams.transcripts[0].events[5].id
    readings = await asyncio.gather(
        *(cluster.client.replay(call_id, after=after) for _ in range(2)),
        *(cluster.client.replay(call_id) for _ in range(2)),
    )
    (transcript,) = await streams.wait_ended()
    raws = [b"".join(event.raw for event in reading) for reading in readings]
    assert raws[0] == raws[1] == b"".join(event.raw for event in transcript.events[6:])
    assert raws[2] == raws[3] == transcript.raw
    assert await check_all(cluster, [transcript]) == {"length": 1}


async def test_row_21_ids_that_are_none(cluster: Cluster, rng: random.Random) -> None:
    """An event id beyond the journal of an ended response is a divergence (409), not a client
    error: the store may have lost entries. Ids of other tenants are part of the tests of the API.
    """
    streams = Streams(cluster.client, [cluster.body(rng, max_tokens=30)])
    (transcript,) = await streams.wait_ended()
    assert transcript.call_id
    assert (transcript.last_id or "").startswith("30.")
    unknown = transcript.call_id[:-6] + "abcdef"
    for path, event_id, status in (
        (transcript.call_id, "29.ffffff", 409),
        (transcript.call_id, "31.000000", 409),
        (transcript.call_id, "999999999.000000", 409),
        (transcript.call_id, "-1.000000", 400),
        (transcript.call_id, "3", 400),
        (unknown, "1.000000", 404),
        (unknown, "", 404),
        ("..%2f..%2fetc", "", 404),
        ("x" * 500, "", 404),
    ):
        headers = {"last-event-id": event_id} if event_id else {}
        address = cluster.client.next_address()
        async with call(address, "GET", f"/v1/streams/{path}", headers=headers) as reply:
            said = await reply.body()
            assert reply.status == status, (path, event_id, said)
            assert b'"error"' in said
            assert b"token_ids" not in said
    assert await check_all(cluster, [transcript]) == {"length": 1}


async def test_row_22_cancels_race_with_everything(cluster: Cluster, rng: random.Random) -> None:
    """Cancels before, during and after a request, twice, and during an engine's death."""
    bodies = [cluster.body(rng, max_tokens=rng.randint(1, 60)) for _ in range(40)]
    streams = Streams(cluster.client, bodies)

    async def cancel(transcript: Transcript) -> None:
        while transcript.call_id is None:
            await asyncio.sleep(0.002)
        await asyncio.sleep(rng.random())
        path = f"/v1/streams/{transcript.call_id}"
        for _ in range(2):
            async with call(cluster.client.next_address(), "DELETE", path) as reply:
                assert reply.status == 200

    async def kill() -> None:
        await asyncio.sleep(0.3)
        cluster.engines[0].kill()

    await asyncio.gather(kill(), *(cancel(each) for each in streams.transcripts[::2]))
    await streams.wait_ended()
    reasons = await check_all(cluster, streams.transcripts)
    assert set(reasons) <= {"length", "cancelled"}
    assert reasons["cancelled"]
    assert reasons["length"] >= 20


async def test_row_36_one_key_is_one_generation(cluster: Cluster, rng: random.Random) -> None:
    body = cluster.body(rng)
    streams = Streams(cluster.client, [body] * 10, idempotency_key="the-same")
    transcripts = await streams.wait_ended()
    assert len({each.call_id for each in transcripts}) == 1
    assert len({each.raw for each in transcripts}) == 1
    another = body | {"max_tokens": 3}
    headers = {"idempotency-key": "the-same"}
    address = cluster.client.next_address()
    async with call(address, "POST", "/v1/completions", body=another, headers=headers) as reply:
        assert reply.status == 409
        assert reply.headers["x-should-retry"] == "false"
    assert await check_all(cluster, transcripts) == {"length": 1}


async def test_row_37_a_deadline_passes_in_the_queue(cluster: Cluster, rng: random.Random) -> None:
    """No engine computes it. Row 6 tests a deadline that passes while a request runs."""
    for engine in cluster.engines:
        engine.pause()
    body = cluster.body(rng) | {"stream": False}
    headers = {"x-request-timeout-ms": "700"}
    address = cluster.client.next_address()
    async with call(address, "POST", "/v1/completions", body=body, headers=headers) as reply:
        assert reply.status == 504
        assert (await reply.json())["error"]["code"] == "deadline_exceeded"
    for engine in cluster.engines:
        engine.resume()
    computed = {
        engine.pid: engine.metric("quire_prompt_tokens_total") for engine in cluster.engines
    }
    assert await check_all(cluster, []) == {"deadline": 1}
    await asyncio.sleep(0.5)
    for engine in cluster.engines:
        assert engine.metric("quire_prompt_tokens_total") == computed[engine.pid]


async def test_row_17_everything_is_replaced_under_load(
    own_cluster: Callable[..., Cluster], rng: random.Random
) -> None:
    """Three rounds: new replicas start, the balancer uses them, the old ones get SIGTERM."""
    cluster = await asyncio.to_thread(own_cluster, num_apis=2)
    cluster.reset()
    gone: list[Replica] = []
    async with ClosedLoop(
        cluster.client, lambda: cluster.body(rng, max_tokens=100), width=6
    ) as load:
        for _ in range(3):
            engines, apis = tuple(cluster.engines), tuple(cluster.apis)
            new = [cluster.replace(each) for each in engines] + [cluster.start_api() for _ in apis]
            await asyncio.to_thread(wait_all_ready, new)
            for engine in engines:
                engine.terminate()
                assert await asyncio.to_thread(engine.exit_code) == 0
            for api in apis:
                await cluster.retire_api(api)
            gone += [*engines, *apis]
    assert [each.exit_code() for each in gone] == [0] * 12
    assert not any(each.refusals for each in load.transcripts)
    reasons = await check_all(cluster, load.transcripts)
    assert reasons == {"length": len(load.transcripts)}
    assert not any(cluster.deaths(each) for each in call_ids(load))


def call_ids(load: ClosedLoop) -> list[str]:
    return [each.call_id for each in load.transcripts if each.call_id]
