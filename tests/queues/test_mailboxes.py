"""What Redis sends to processes: wake-ups of engines, and the records of journals to readers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from redis import Redis

from service.messages import Record
from service.queues.contract import Claim, QueueLimits, Write
from service.queues.redis.mailbox import HELD
from service.queues.redis.queue import RedisQueue
from tests.cluster.redis_process import RedisServer
from tests.queues.builders import (
    answer_of,
    claim_one,
    finish,
    ids_of,
    make_engine,
    make_submission,
    oracle,
    stop_at,
)
from tests.queues.contract import LIMITS, NOTHING
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.slow

Queues = Callable[[str, QueueLimits], RedisQueue]
MANY = replace(LIMITS, lease=6 * PATIENCE, max_requests=100, max_per_tenant=100)


@pytest.fixture
def without_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines look for work only if they are woken, and followers get messages or nothing."""
    monkeypatch.setattr("service.queues.redis.claims.LOOK_AGAIN", 3 * PATIENCE)
    monkeypatch.setattr("service.queues.redis.journal.LOOK_AGAIN", 3 * PATIENCE)


def num_waiting(server: RedisServer) -> int:
    with Redis(port=server.port) as admin:
        return sum(int(admin.zcard(key)) for key in admin.keys("quire:2:{s0}:waiting:*"))


def num_subscribed(server: RedisServer) -> int:
    with Redis(port=server.port) as admin:
        return len(admin.pubsub_shardchannels("quire:2:{s0}:m:*"))


class Engines:
    """Engines that wait, each over a queue of its own, for `limit` requests."""

    def __init__(self, server: RedisServer, queues: Sequence[RedisQueue], *, limit: int) -> None:
        self.server = server
        self.claimed: list[Sequence[Claim]] = []
        self._tasks = [
            asyncio.create_task(self._wait(queue, index, limit))
            for index, queue in enumerate(queues)
        ]

    async def _wait(self, queue: RedisQueue, index: int, limit: int) -> None:
        claims = await queue.claim(make_engine(f"e{index}"), limit=limit, wait=2 * PATIENCE)
        self.claimed.append(claims)

    async def ready(self) -> None:
        """All are subscribed and wait."""
        count = len(self._tasks)
        await until(lambda: num_subscribed(self.server) >= count)
        await until(lambda: num_waiting(self.server) == count)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_a_submission_wakes_one_engine(
    redis_server: RedisServer, redis_queues: Queues, without_polls: None
) -> None:
    """All looked, and all but one in vain."""
    api, *queues = (redis_queues(redis_server.url, MANY) for _ in range(6))
    engines = Engines(redis_server, queues, limit=4)
    await engines.ready()
    for count in range(1, 4):
        await api.submit(make_submission())
        await until(lambda: len(engines.claimed) == count)  # noqa: B023
        assert num_waiting(redis_server) == 5 - count
    assert [len(claims) for claims in engines.claimed] == [1, 1, 1]
    await engines.end()


async def test_an_engine_without_room_for_all_wakes_the_next_one(
    redis_server: RedisServer, redis_queues: Queues, without_polls: None
) -> None:
    api, *queues = (redis_queues(redis_server.url, MANY) for _ in range(5))
    engines = Engines(redis_server, queues, limit=2)
    await engines.ready()
    await api.submit(make_submission(7))
    await until(lambda: len(engines.claimed) == 4)
    assert sorted(len(claims) for claims in engines.claimed) == [1, 2, 2, 2]


async def test_an_engine_of_another_kind_is_not_woken(
    redis_server: RedisServer, redis_queues: Queues, without_polls: None
) -> None:
    """The one that has waited longest lacks the feature that the request needs."""
    api, old, new = (redis_queues(redis_server.url, MANY) for _ in range(3))
    without, having = make_engine("old", features=()), make_engine("new", features=("x", "grammar"))
    waiting = asyncio.create_task(old.claim(without, limit=1, wait=2 * PATIENCE))
    await until(lambda: num_waiting(redis_server) == 1 and num_subscribed(redis_server))
    able = asyncio.create_task(claim_one(new, having, wait=2 * PATIENCE))
    await until(lambda: num_waiting(redis_server) == num_subscribed(redis_server) == 2)
    await api.submit(make_submission(grammar="start: 'a'"))
    async with asyncio.timeout(PATIENCE):
        assert (await able).request.grammar
    assert num_waiting(redis_server) == 1
    await api.submit(make_submission())
    async with asyncio.timeout(PATIENCE):
        assert len(await waiting) == 1


async def test_an_engine_that_is_gone_or_drains_is_not_woken(
    redis_server: RedisServer, redis_queues: Queues, without_polls: None
) -> None:
    """They have waited longest. One was killed: its connection is closed, but not its entry."""
    api, gone, draining, last = (redis_queues(redis_server.url, MANY) for _ in range(4))
    for count, queue in enumerate((gone, draining, last), start=1):
        # It times out, and the engine would call again.
        await queue.claim(make_engine(f"e{count}"), limit=1, wait=0.01)
        await until(lambda: num_subscribed(redis_server) == count)  # noqa: B023
    assert num_waiting(redis_server) == 3
    await gone.close()
    await until(lambda: num_subscribed(redis_server) == 2)
    await draining.claim(make_engine("e2"), limit=0, wait=0)
    assert num_waiting(redis_server) == 2
    waiting = asyncio.create_task(claim_one(last, make_engine("e3"), wait=2 * PATIENCE))
    await api.submit(make_submission())
    async with asyncio.timeout(PATIENCE):
        await finish(last, await waiting, length=1)
    assert await api.depth() == NOTHING


async def test_a_lost_wake_up_delays_a_request_only(
    redis_server: RedisServer, redis_queues: Queues
) -> None:
    """The engine's entry is lost: nothing wakes it, and it looks again by itself."""
    api, engine = (redis_queues(redis_server.url, MANY) for _ in range(2))
    waiting = asyncio.create_task(claim_one(engine, wait=2 * PATIENCE))
    await until(lambda: num_waiting(redis_server) == num_subscribed(redis_server) == 1)
    with Redis(port=redis_server.port) as admin:
        admin.delete("quire:2:{s0}:kinds", *admin.keys("quire:2:{s0}:waiting:*"))
    await api.submit(make_submission())
    async with asyncio.timeout(PATIENCE):
        await waiting


async def test_while_it_waits_an_engine_sends_nothing_before_its_turn(
    redis_server: RedisServer, redis_queues: Queues, without_polls: None
) -> None:
    queue = redis_queues(redis_server.url, MANY)
    assert not await queue.claim(make_engine(), limit=1, wait=0.01)
    await until(lambda: num_subscribed(redis_server))
    assert not await queue.claim(
        make_engine(), limit=1, wait=0.01
    )  # subscribed: it looks once more
    with Redis(port=redis_server.port) as admin:
        admin.config_resetstat()
        for _ in range(20):
            assert not await queue.claim(make_engine(), limit=1, wait=0.001)
        assert "cmdstat_evalsha" not in admin.info("commandstats")


async def test_readers_get_records_without_asking(
    redis_server: RedisServer, redis_queues: Queues, without_polls: None
) -> None:
    """Two readers in one replica, one in another; all have the first record before the others are
    written, and then no command reads a journal.
    """
    engine, *replicas = (redis_queues(redis_server.url, MANY) for _ in range(3))
    await engine.submit(make_submission(max_tokens=40))
    claim = await claim_one(engine)
    rid = claim.request.id
    got: list[list[Record]] = [[], [], []]

    async def read(queue: RedisQueue, into: list[Record]) -> None:
        async for record in queue.follow(rid):
            into.append(record)  # noqa: PERF401  # seen before the end

    reading = [
        asyncio.create_task(read(queue, into))
        for queue, into in zip((replicas[0], *replicas), got, strict=True)
    ]
    await until(lambda: num_subscribed(redis_server) == 3)
    await engine.write([Write(claim.lease, answer_of(rid, 0, 1))])
    await until(lambda: all(got))
    with Redis(port=redis_server.port) as admin:
        admin.config_resetstat()
        for count in range(1, 40):
            await engine.write([Write(claim.lease, answer_of(rid, count, count + 1))])
        await engine.write([Write(claim.lease, stop_at(40))])
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*reading)
        assert "cmdstat_xrange" not in admin.info("commandstats")
    for records in got:
        assert records == [*(answer_of(rid, i, i + 1) for i in range(40)), stop_at(40)]


async def test_a_follower_that_does_not_keep_up_reads_the_journal(
    redis_server: RedisServer, redis_queues: Queues, without_polls: None
) -> None:
    """It holds a bounded number of records meanwhile, and misses none."""
    queue = redis_queues(redis_server.url, MANY)
    count = 3 * HELD
    await queue.submit(make_submission(max_tokens=count))
    claim = await claim_one(queue)
    rid = claim.request.id
    records = aiter(queue.follow(rid))
    await queue.write([Write(claim.lease, answer_of(rid, 0, 1))])
    got = [await anext(records)]
    for i in range(1, count):
        await queue.write([Write(claim.lease, answer_of(rid, i, i + 1))])
    (inbox,) = queue._mailbox._inboxes[rid]
    await until(lambda: inbox.outdated)
    assert len(inbox.records) <= HELD
    await queue.write([Write(claim.lease, stop_at(count))])
    async with asyncio.timeout(PATIENCE):
        got += [record async for record in records]
    assert ids_of(got) == [oracle(rid, i) for i in range(count)]
    assert got[-1] == stop_at(count)
    assert not queue._mailbox._inboxes


async def test_a_broken_journal_harms_no_other(
    redis_server: RedisServer, redis_queues: Queues
) -> None:
    queue = redis_queues(redis_server.url, MANY)
    await queue.submit(make_submission(3))
    claims = await queue.claim(make_engine(), limit=3, wait=0)
    redis_server.ask("SET", f"quire:2:{{s0}}:t:{claims[1].request.id}", "no stream")
    replies = await queue.write(
        [Write(claim.lease, answer_of(claim.request.id, 0, 2)) for claim in claims]
    )
    assert [reply.status for reply in replies] == ["ok", "fenced", "ok"]
