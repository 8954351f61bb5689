"""What can happen to a Redis, done to a real one: each fault is proved to have happened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from service.errors import NotFound, StartupError, Unavailable
from service.messages import End, FinishReason, Record
from service.queues.contract import QueueLimits, Write, WriteReply, WriteStatus
from service.queues.observer import QueueEvent
from service.queues.redis.queue import RedisQueue
from tests.cluster.redis_process import RedisServer
from tests.faults.proxy import FaultProxy
from tests.queues.builders import (
    Counts,
    answer_of,
    append,
    claim_one,
    count_stored,
    finish,
    make_engine,
    make_submission,
    stop_at,
)
from tests.queues.contract import LIMITS, NOTHING
from tests.support.waiting import PATIENCE, available, until

pytestmark = pytest.mark.slow

Queues = Callable[[str, QueueLimits], RedisQueue]
PREFIX = "quire:2:{s0}:"
LONG = replace(LIMITS, lease=30.0, resume_window=60.0)


@pytest.fixture
def queue(own_redis: RedisServer, redis_queues: Queues) -> RedisQueue:
    return redis_queues(own_redis.url, LONG)


@pytest.fixture
async def proxy(own_redis: RedisServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(own_redis.port) as proxy:
        yield proxy


async def collect(
    queue: RedisQueue, request_id: str, into: list[Record] | None = None
) -> list[Record]:
    """The records to the end; `into` holds those that came so far."""
    records = [] if into is None else into
    async for record in queue.follow(request_id):
        records.append(record)
    return records


async def test_scripts_are_loaded_again(queue: RedisQueue, own_redis: RedisServer) -> None:
    await queue.submit(make_submission())
    claim = await claim_one(queue)
    rid = claim.request.id
    own_redis.ask("SCRIPT", "FLUSH")
    writes = [Write(claim.lease, answer_of(rid, i, i + 1)) for i in range(3)]
    assert [reply.status for reply in await queue.write(writes)] == ["ok"] * 3
    own_redis.ask("SCRIPT", "FLUSH")
    await finish(queue, replace(claim, tokens=(0,) * 3), length=3)


async def test_after_flushall_followers_fail_and_work_goes_on(
    queue: RedisQueue, own_redis: RedisServer
) -> None:
    submission = make_submission()
    await queue.submit(submission)
    claim = await claim_one(queue)
    following = asyncio.create_task(collect(queue, claim.request.id))
    await append(queue, claim.lease, answer_of(claim.request.id, 0, 1))
    await asyncio.sleep(0.1)
    own_redis.ask("FLUSHALL")
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(NotFound):
            await following
    fenced = await append(queue, claim.lease, answer_of(claim.request.id, 1, 2))
    assert fenced.status is WriteStatus.FENCED
    assert list(await queue.renew([claim.lease])) == [claim.request.id]
    await queue.submit(make_submission())
    await finish(queue, await claim_one(queue), length=2)
    assert await queue.depth() == NOTHING


async def test_a_destroyed_group_is_made_again_and_nothing_is_lost(
    queue: RedisQueue, own_redis: RedisServer
) -> None:
    """What ran goes on with its owner, what waited is delivered, what is orphaned is found."""
    for _ in range(3):
        await queue.submit(make_submission())
    running, orphan = await queue.claim(make_engine("e0"), limit=2, wait=0)
    assert own_redis.ask("XGROUP", "DESTROY", PREFIX + "q1", "engines") == ":1"
    assert list(await queue.renew([running.lease])) == []
    waiting = await claim_one(queue, make_engine("e1"))
    assert waiting.request.id not in {running.request.id, orphan.request.id}
    for _ in range(4):
        own_redis.advance(LONG.lease / 3)
        assert list(await queue.renew([running.lease])) == []
        assert list(await queue.renew([waiting.lease])) == []
    taken = await claim_one(queue, make_engine("e1"), wait=PATIENCE)
    assert (taken.request.id, taken.attempt) == (orphan.request.id, 1), "its engine is heard of"
    for claim in (running, waiting, taken):
        await finish(queue, claim, length=1)
    assert await queue.depth() == NOTHING
    assert own_redis.ask("XLEN", PREFIX + "q1") == ":0"


async def test_a_follower_outlives_its_pubsub_connection(
    queue: RedisQueue, own_redis: RedisServer
) -> None:
    """Killed before every write, so that no wake-up comes: the fallback must find the tokens."""
    await queue.submit(make_submission())
    claim = await claim_one(queue)
    rid = claim.request.id
    records = aiter(queue.follow(rid))
    killed = 0
    for i in range(3):
        waiting = asyncio.ensure_future(anext(records))
        await until(lambda: own_redis.ask("PUBSUB", "SHARDCHANNELS") != "*0")
        killed += int(own_redis.ask("CLIENT", "KILL", "TYPE", "pubsub").lstrip(":"))
        async with asyncio.timeout(PATIENCE):
            await append(queue, claim.lease, answer_of(rid, i, i + 1))
            assert await waiting == answer_of(rid, i, i + 1)
    assert killed == 3


async def test_a_full_redis_refuses_work_but_lets_answers_end(
    queue: RedisQueue, own_redis: RedisServer
) -> None:
    for _ in range(2):
        await queue.submit(make_submission())
    claim, other = await queue.claim(make_engine(), limit=2, wait=0)
    rid = claim.request.id
    await append(queue, claim.lease, answer_of(rid, 0, 1))
    own_redis.ask("CONFIG", "SET", "maxmemory", "1mb")
    assert own_redis.ask("SET", "x", "y").startswith("-OOM")
    for refused in (
        queue.submit(make_submission()),
        queue.write([Write(claim.lease, answer_of(rid, 1, 2)), Write(claim.lease, stop_at(2))]),
    ):
        with pytest.raises(Unavailable) as caught:
            await refused
        assert caught.value.code == "storage_full"
    assert list(await queue.renew([claim.lease, other.lease])) == []
    full = End(count=1, reason=FinishReason.ERROR, error="storage_full")
    assert await append(queue, claim.lease, full) == WriteReply(WriteStatus.OK, 1)
    await queue.stop([other.request.id], FinishReason.CANCELLED)
    assert await queue.depth() == NOTHING
    assert list(await queue.read(rid)) == [answer_of(rid, 0, 1), full]
    own_redis.ask("CONFIG", "SET", "maxmemory", "0")
    assert (await queue.submit(make_submission())).status == "ok"


async def test_stored_bytes_survive_a_crash_of_redis_and_of_replicas(
    own_redis: RedisServer, redis_queues: Queues
) -> None:
    """One replica admits, another one sweeps, and the counters equal what is there, also after a
    restart: nothing stays counted that is gone, and nothing is there that is not counted.
    """
    limits = replace(LIMITS, idempotency_ttl=2.0, resume_window=2.0)
    first, second = (redis_queues(own_redis.url, limits) for _ in range(2))
    submissions = [make_submission(2, tenant=name, key="k", grace=0.01) for name in "ab"]
    submissions.append(kept := make_submission(tenant="b", priority=0, keep=8.0, sent="é"))
    for submission in submissions:
        assert (await first.submit(submission)).status == "ok"
    for claim in await second.claim(make_engine(), limit=3, wait=0):
        await finish(second, claim, length=3)
    counted, again = await count_stored(second, submissions)
    assert counted == again
    assert counted.keys() == {"a", "b"}
    own_redis.kill()
    own_redis.start()
    after, again = await count_stored(second, submissions)
    assert after == again == counted
    assert await first.read_input(kept.id) == "é"
    while (await second.depth()).stored_bytes:
        own_redis.advance(0.5)
        await second.sweep()
        counted, again = await count_stored(second, submissions)
        assert counted == again
    assert own_redis.ask("EXISTS", "quire:2:{s0}:stored", "quire:2:{s0}:gone") == ":0"


async def test_a_restart_of_redis_costs_nobody_its_lease(
    own_redis: RedisServer, redis_queues: Queues, counts: Counts
) -> None:
    """Down for longer than a lease: idle engines must not take what the owners will renew."""
    owner, idle = (redis_queues(own_redis.url, LONG) for _ in range(2))
    submission = make_submission()
    rid = submission.requests[0].id
    await owner.submit(submission)
    claim = await claim_one(owner, make_engine("owner"))
    await append(owner, claim.lease, answer_of(rid, 0, 1))
    following = asyncio.create_task(collect(idle, rid))
    await idle.claim(make_engine("idle"), limit=1, wait=0)
    old = own_redis.pid
    own_redis.kill()
    taken: list[object] = []

    async def be_idle() -> None:
        while not following.done():
            try:
                taken.extend(await idle.claim(make_engine("idle"), limit=1, wait=0.1))
            except Unavailable:
                await asyncio.sleep(0.05)

    idling = asyncio.create_task(be_idle())
    with pytest.raises(Unavailable):
        await owner.renew([claim.lease])
    own_redis.advance(LONG.lease + 1)
    await asyncio.to_thread(own_redis.start)
    assert own_redis.pid != old
    await available(lambda: idle.claim(make_engine("idle"), limit=1, wait=0))
    assert list(await available(lambda: owner.renew([claim.lease]))) == []
    await idle.claim(make_engine("idle"), limit=1, wait=0.5)
    await finish(owner, replace(claim, tokens=(0,)), length=3)
    async with asyncio.timeout(PATIENCE):
        got = await following
    assert got == [answer_of(rid, 0, 1), answer_of(rid, 1, 3), stop_at(3)]
    await idling
    assert not taken
    assert counts[QueueEvent.OUTAGE] >= 1
    assert counts[QueueEvent.RECLAIMED] == 0


async def test_a_lost_tail_is_a_gap_and_is_sent_again(
    queue: RedisQueue, own_redis: RedisServer
) -> None:
    """Power loss: the last commands are cut off the append-only file."""
    await queue.submit(make_submission())
    claim = await claim_one(queue)
    rid = claim.request.id
    await append(queue, claim.lease, answer_of(rid, 0, 1))
    (newest,) = (own_redis.directory / "appendonlydir").glob("*.incr.aof")
    kept = newest.stat().st_size
    got: list[Record] = []
    following = asyncio.create_task(collect(queue, rid, into=got))
    for i in range(1, 4):
        await append(queue, claim.lease, answer_of(rid, i, i + 1))
    await until(lambda: len(got) == 4)
    own_redis.kill()
    with newest.open("r+b") as tail:
        tail.truncate(kept + 20)  # in the middle of a transaction: it is dropped as a whole
    await asyncio.to_thread(own_redis.start)
    gap = await append(queue, claim.lease, answer_of(rid, 4, 5))
    assert gap == WriteReply(WriteStatus.GAP, 1)
    assert (await append(queue, claim.lease, answer_of(rid, 1, 5))).status is WriteStatus.OK
    await append(queue, claim.lease, stop_at(5))
    async with asyncio.timeout(PATIENCE):
        await following
    expected = [*(answer_of(rid, i, i + 1) for i in range(4)), answer_of(rid, 1, 5), stop_at(5)]
    assert got == expected  # the record that straddles what was sent comes whole


@pytest.mark.parametrize(
    ("options", "query", "message"),
    [
        ((), "", "appendonly"),
        ((), "?allow_volatile=1", None),
        (("--appendonly", "yes", "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), "",
         "noeviction"),
        (("--appendonly", "yes", "--maxmemory", "100mb", "--maxmemory-policy", "noeviction"), "",
         None),
    ],
)  # fmt: skip
async def test_what_a_server_is_decides_at_the_start(
    tmp_path: Path, redis_queues: Queues, options: tuple[str, ...], query: str, message: str | None
) -> None:
    server = RedisServer(tmp_path / "other", options=options)
    server.start()
    try:
        queue = redis_queues(server.url + query, LIMITS)
        if message is None:
            await queue.open()
        else:
            with pytest.raises(StartupError, match=message):
                await queue.open()
        await queue.close()
    finally:
        server.close()


async def test_a_slow_redis_fences_nobody(
    own_redis: RedisServer, redis_queues: Queues, proxy: FaultProxy, counts: Counts
) -> None:
    queue = redis_queues(f"redis://127.0.0.1:{proxy.port}/0", LONG)
    proxy.delay = 0.2
    await queue.submit(make_submission())
    claim = await claim_one(queue)
    rid = claim.request.id
    following = asyncio.create_task(collect(queue, rid))
    for i in range(4):
        await append(queue, claim.lease, answer_of(rid, i, i + 1))
        assert list(await queue.renew([claim.lease])) == []
    await append(queue, claim.lease, stop_at(4))
    assert await following == [*(answer_of(rid, i, i + 1) for i in range(4)), stop_at(4)]
    assert not counts[QueueEvent.FENCED]


async def test_a_lost_reply_to_an_append_is_a_dup(
    own_redis: RedisServer, redis_queues: Queues, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.queues.redis.servers.REPLY_TIMEOUT", 0.3)
    queue = redis_queues(f"redis://127.0.0.1:{proxy.port}/0", LONG)
    await available(lambda: queue.submit(make_submission()))
    claim = await available(lambda: claim_one(queue))
    record = answer_of(claim.request.id, 0, 2)
    proxy.swallow_replies = True
    with pytest.raises(Unavailable):
        await append(queue, claim.lease, record)
    assert proxy.swallowed
    proxy.swallow_replies = False
    again = await available(lambda: append(queue, claim.lease, record))
    assert again == WriteReply(WriteStatus.DUP, 2)


async def test_a_broken_connection_heals_within_the_call(
    own_redis: RedisServer, redis_queues: Queues, proxy: FaultProxy
) -> None:
    queue = redis_queues(f"redis://127.0.0.1:{proxy.port}/0", LONG)
    await queue.submit(make_submission())
    claim = await claim_one(queue)
    for i in range(5):
        proxy.cut()
        reply = await append(queue, claim.lease, answer_of(claim.request.id, i, i + 1))
        assert reply.status in {WriteStatus.OK, WriteStatus.DUP}
    submission = make_submission()
    proxy.cut()
    assert (await queue.submit(submission)).status == "ok"  # and not "exists", of its own


async def test_a_claim_into_a_black_hole_is_replayed(
    own_redis: RedisServer, redis_queues: Queues, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim ran, its reply never came; the same engine gets the same lease, without blame."""
    monkeypatch.setattr("service.queues.redis.servers.REPLY_TIMEOUT", 0.3)
    queue = redis_queues(f"redis://127.0.0.1:{proxy.port}/0", LONG)
    await available(lambda: queue.claim(make_engine(), limit=1, wait=0))
    submission = make_submission(2)
    await available(lambda: queue.submit(submission))
    proxy.swallow_replies = True
    with pytest.raises(Unavailable):
        await queue.claim(make_engine(), limit=2, wait=0)
    proxy.swallow_replies = False
    await until(lambda: own_redis.ask("HGET", PREFIX + "adm", "run") == "$1")  # it did run
    claims = await available(lambda: queue.claim(make_engine(), limit=2, wait=0))
    assert [claim.lease.epoch for claim in claims] == [1, 1]
    proxy.black_hole = True
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with pytest.raises(Unavailable):
        await queue.depth()
    assert loop.time() - begun < PATIENCE
    proxy.black_hole = False
    proxy.cut()
    direct = redis_queues(own_redis.url, LONG)
    for claim in claims:
        await finish(direct, claim, length=1)
    assert await direct.depth() == NOTHING
