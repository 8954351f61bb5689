"""Readers and replicas that vanish: an answer goes on while a replica sends heartbeats for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from service.api.http.call import Readers
from service.errors import Unavailable
from service.messages import End
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.cluster.redis_process import RedisServer
from tests.support.stepped import STEP, SteppedQueue, SteppedRedisQueue
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.slow

GRACE = 0.8
B = {"model": "tiny-model", "prompt": "hello", "max_tokens": 60, "seed": 3, "stream": True}
IDS = {"x-quire-event-ids": "1"}


class Pair(NamedTuple):
    """Two replicas of one queue. The first sends no heartbeats: to the queue it is dead."""

    dead: Any
    alive: Any
    client: httpx.AsyncClient  # of the one alive


@pytest.fixture
async def pair(start_service: Any, small_limits: Any, listen: Any) -> AsyncIterator[Pair]:
    limits = small_limits(grace=GRACE, replica_grace=GRACE, sweep_interval=0.02)
    async with (
        start_service(limits=limits, queue=SteppedQueue(QueueLimits(lease=1e3))) as dead,
        start_service(limits=limits, queue=dead.queue, running=False) as alive,
        listen(alive.app) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
    ):
        dead.engine.pause = STEP
        yield Pair(dead, alive, client)


async def begun(pair: Pair, **headers: str) -> asyncio.Task[Any]:
    """A stream at the replica that nobody hears of again."""
    call = asyncio.create_task(pair.dead.client.post("/v1/completions", json=B, headers=headers))
    await until(lambda: len(pair.dead.engine.seen) == 1)
    return call


async def tokens(pair: Pair, count: int) -> None:
    """Waits for so many steps of the first answer."""
    while len(await pair.dead.queue.read(pair.dead.engine.seen[0].id)) < count:
        await asyncio.sleep(STEP / 4)


async def end_of(pair: Pair) -> End:
    last = (await pair.dead.queue.read(pair.dead.engine.seen[0].id))[-1]
    assert isinstance(last, End)
    return last


@pytest.mark.parametrize("headers", [{}, pytest.param(IDS, marks=pytest.mark.slow)])
async def test_a_dead_replica_s_answers_are_cancelled(pair: Pair, headers: dict[str, str]) -> None:
    """Its readers are gone with it, whatever they had asked for; only `continue` runs on."""
    call = await begun(pair, **headers)
    await call  # the replica's own reader sees the end, too: it only counts for nothing
    assert pair.dead.queue.now >= GRACE
    assert (await end_of(pair)).reason == "cancelled"
    assert 0 < (await end_of(pair)).count < 60


async def test_a_reader_at_another_replica_keeps_it_alive(pair: Pair) -> None:
    call = await begun(pair, **IDS)
    call_id = pair.dead.engine.seen[0].id.removesuffix(".0")
    await tokens(pair, 8)
    resumed = await pair.client.get(f"/v1/streams/{call_id}")
    assert (await end_of(pair)).reason == "length"
    assert resumed.content == (await call).content


@pytest.mark.slow
async def test_a_retry_with_the_same_key_elsewhere_keeps_it_alive(pair: Pair) -> None:
    key = {"idempotency-key": "k"}
    call = await begun(pair, **key)
    await tokens(pair, 8)
    again = await pair.client.post("/v1/completions", json=B, headers=key)
    assert (await end_of(pair)).reason == "length"
    assert again.content == (await call).content
    assert len(pair.dead.engine.seen) == 1


async def test_background_and_continue_need_nobody(pair: Pair) -> None:
    pair.dead.engine.pause = 0.002
    body = {"model": "tiny-model", "input": "x", "background": True, "max_output_tokens": 99}
    await pair.dead.client.post("/v1/responses", json=body)
    await pair.dead.client.post("/v1/completions", json=B | {"on_disconnect": "continue"})
    await until(lambda: not pair.dead.queue._running)
    ends = [(await pair.dead.queue.read(r.id))[-1] for r in pair.dead.engine.seen]
    assert {end.reason for end in ends} == {"length"}


async def test_leaving_one_replica_does_not_end_it_at_another(pair: Pair, listen: Any) -> None:
    """The reader who went on elsewhere is not cut off when the first connection is found dead."""
    async with (
        listen(pair.dead.app) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE) as first,
    ):
        async with first.stream("POST", "/v1/completions", json=B, headers=IDS) as reply:
            call_id = reply.headers["x-request-id"]
            resumed = asyncio.create_task(pair.client.get(f"/v1/streams/{call_id}"))
            await until(lambda: bool(pair.alive.app.state.context.readers.ids))
        await until(lambda: not pair.dead.app.state.context.readers.ids)
        assert not resumed.done()
        assert b'"finish_reason":"length"' in (await resumed).content


async def test_heartbeats_go_on_after_an_outage() -> None:
    class Away(MemoryQueue):
        told: int = 0

        async def heartbeat(self, submission_ids: Any) -> None:
            assert list(submission_ids) == ["a"]
            self.told += 1
            if self.told == 1:
                raise Unavailable("away")

    queue = Away(QueueLimits())
    readers = Readers(queue)
    for call_id in ("a", "a", "b"):
        readers.add(call_id)
    assert (readers.remove("b"), readers.remove("a")) == (True, False)
    running = asyncio.create_task(readers.send_heartbeats(0.01))
    await until(lambda: queue.told >= 3)
    running.cancel()


@pytest.mark.slow
async def test_replicas_over_redis(
    start_service: Any, small_limits: Any, listen: Any, tmp_path: Path
) -> None:
    """The same with a real Redis: a reader goes on at another replica, and then nobody reads."""
    server = RedisServer(tmp_path, frozen_clock=True)
    server.start()
    queues = [SteppedRedisQueue(QueueLimits(lease=1e3), server) for _ in range(2)]
    limits = small_limits(grace=GRACE, replica_grace=GRACE, sweep_interval=0.05)
    async with (
        start_service(limits=limits, queue=queues[0]) as dead,
        start_service(limits=limits, queue=queues[1], running=False) as alive,
        listen(alive.app) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
    ):
        dead.engine.pause = STEP
        pair = Pair(dead, alive, client)
        await test_a_reader_at_another_replica_keeps_it_alive(pair)
        body = {"model": "tiny-model", "input": "x", "max_output_tokens": 120}
        call = asyncio.create_task(dead.client.post("/v1/responses", json=body | {"stream": True}))
        await until(lambda: len(dead.engine.seen) == 2)
        path = f"/v1/responses/resp_{dead.engine.seen[1].id.removesuffix('.0')}"
        first = await client.get(path, params={"stream": "true"}, timeout=PATIENCE)
        assert first.content == (await call).content
        left = await dead.client.post("/v1/completions", json=B)
        assert b'"finish_reason":"cancelled"' in left.content
        assert (await client.delete(path)).status_code == 200
        assert (await client.get(path)).status_code == 404
    for queue in queues:
        await queue.close()
    server.close()


async def test_a_new_reader_sends_a_heartbeat_at_once(start_service: Any) -> None:
    """Not from the next round on: there may be little left of the grace."""

    class Watched(MemoryQueue):
        attended: tuple[str, ...] = ()

        async def heartbeat(self, submission_ids: Any) -> None:
            self.attended += tuple(submission_ids)

    queue = Watched(QueueLimits())
    async with start_service(queue=queue) as service:
        body = {"model": "tiny-model", "input": "x", "max_output_tokens": 2}
        response = await service.post("/v1/responses", body)
        call = await service.post("/v1/completions", B, idempotency_key="k")
        assert not queue.attended
        call_id, response_id = (r.headers["x-request-id"] for r in (call, response))
        await service.client.get(f"/v1/responses/resp_{response_id}", params={"stream": "1"})
        await service.post("/v1/completions", B, idempotency_key="k")
        await service.client.get(f"/v1/streams/{call_id}")
        assert queue.attended == (response_id, call_id, call_id)
