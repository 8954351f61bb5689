"""The limits of a queue of several shards hold in total, however calls are spread over them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from service.messages import Allowance, FinishReason, Submission
from service.queues.contract import QueueLimits, SubmitStatus
from service.queues.redis.sharded import ShardedQueue, open_redis
from service.queues.redis.shares import share
from tests.cluster.redis_process import RedisServer
from tests.queues.builders import (
    claim_one,
    count_stored,
    finish,
    make_engine,
    make_submission,
)
from tests.queues.contract import LIMITS

pytestmark = pytest.mark.slow

WIDE = replace(
    LIMITS,
    max_requests=1000,
    max_tokens=1_000_000,
    max_per_tenant=1000,
    max_bytes=10**9,
    max_tenant_bytes=10**9,
)
Open = Callable[[QueueLimits], ShardedQueue]


@pytest.fixture
async def shards(redis_server: RedisServer) -> AsyncIterator[Open]:
    """Opens replicas of a queue of three shards."""
    made: list[ShardedQueue] = []

    def open_queue(limits: QueueLimits) -> ShardedQueue:
        queue = open_redis(f"{redis_server.url}?shards=3", limits)
        assert isinstance(queue, ShardedQueue)
        made.append(queue)
        return queue

    yield open_queue
    for queue in made:
        await queue.close()


def at_slot(slot: int, number: int) -> str:
    return f"s0-{number:028x}{slot:04x}"


async def statuses(queue: ShardedQueue, submissions: list[Submission]) -> Counter[SubmitStatus]:
    return Counter([(await queue.submit(each)).status for each in submissions])


@pytest.mark.parametrize("limit", [1, 2, 7, 20])
@pytest.mark.parametrize("spread", [1, 2, 3], ids=lambda spread: f"{spread} shards")
async def test_as_many_are_admitted_as_by_one_queue(limit: int, spread: int, shards: Open) -> None:
    """Also if all calls go to one shard: the others lend what they do not use."""
    queue = shards(replace(WIDE, max_per_tenant=limit))
    submissions = [make_submission(identifier=at_slot(i % spread, i)) for i in range(limit + 5)]
    got = await statuses(queue, submissions)
    assert got == {SubmitStatus.OK: limit, SubmitStatus.TENANT: 5}
    await queue.stop([submissions[0].requests[0].id], FinishReason.CANCELLED)
    elsewhere = make_submission(identifier=at_slot(spread % 3, 99))
    assert (await queue.submit(elsewhere)).status is SubmitStatus.OK


async def test_replicas_at_once_never_exceed_a_limit(shards: Open) -> None:
    """What they refuse while they lend is admitted when it is sent again."""
    replicas = [shards(replace(WIDE, max_requests=30)) for _ in range(3)]
    submissions = [make_submission() for _ in range(60)]
    for _ in range(3):
        await asyncio.gather(*(replicas[i % 3].submit(each) for i, each in enumerate(submissions)))
        assert (await replicas[0].depth()).queued_requests <= 30
    got = await statuses(replicas[0], [make_submission() for _ in range(31)])
    assert got[SubmitStatus.FULL] >= 1
    assert (await replicas[0].depth()).queued_requests == 30


@pytest.mark.parametrize("spread", [1, 3])
async def test_tokens_per_minute_hold_in_total(spread: int, shards: Open) -> None:
    """Including a request that counts more than a shard's share."""
    queue = shards(WIDE)
    allowance = Allowance(key="a", tokens_per_minute=1000)
    large = make_submission(identifier=at_slot(0, 500), prompt_ids=(1,) * 596, allowance=allowance)
    assert (await queue.submit(large)).status is SubmitStatus.OK
    small = [
        make_submission(identifier=at_slot(i % spread, i), prompt_ids=(1,) * 6, allowance=allowance)
        for i in range(60)
    ]
    replies = [await queue.submit(each) for each in small]
    admitted = [reply for reply in replies if reply.status is SubmitStatus.OK]
    assert 36 <= len(admitted) <= 40, "600 and 40 * 10; 10 % less is allowed, none more"
    assert replies[-1].status is SubmitStatus.RATE
    assert 0 < replies[-1].usage.wait <= 60 * 10 / 1000 + 0.01
    usage = admitted[-1].usage.tokens
    assert usage is not None
    assert usage.limit == 1000
    assert usage.remaining <= 100


async def test_kept_answers_make_room_on_other_shards(shards: Open) -> None:
    """A tenant that fills its storage goes on; other tenants' answers stay."""
    queue = shards(replace(WIDE, max_tenant_bytes=60_000))
    theirs = make_submission(tenant="b", keep=60.0, sent="x" * 9_000)
    mine = [
        make_submission(identifier=at_slot(i % 2, i), tenant="a", keep=60.0, sent="x" * 9_000)
        for i in range(12)
    ]
    large = make_submission(identifier=at_slot(2, 99), tenant="a", sent="", manifest="x" * 30_000)
    for submission in (theirs, *mine, large):
        assert (await queue.submit(submission)).status is SubmitStatus.OK
        await finish(queue, await claim_one(queue), length=1)
        stored, again = await count_stored(queue, [])
        assert stored.get("a", 0) <= 60_000, again
    assert await queue.read_input(theirs.id) is not None
    assert await queue.read_input(mine[0].id) is None


async def missing(queue: ShardedQueue) -> int:
    """Places for requests of the tenant that no shard has."""
    loans = [await shard.lender.loans() for shard in queue._shards]
    return sum(table.get("t:public", 0) for table in loans)


async def test_a_loan_that_was_lost_is_mended(
    shards: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process took it from the lender and died before it gave it to the borrower."""
    limits = replace(WIDE, max_per_tenant=9)
    queue, other = shards(limits), shards(limits)
    lender = queue._shards[1].lender
    part = {"name": "t:public", "stored": False, "field": "t:public", "most": 3, "amount": 2}
    for _ in range(2):  # the reply was lost
        assert await lender.lend(nonce="n", limits=[part]) == [b"2"]
    few = await statuses(queue, [make_submission() for _ in range(9)])
    assert few[SubmitStatus.OK] == 7
    for replica in (queue, other):
        await replica.sweep()
    assert await missing(queue) == 2
    monkeypatch.setattr("service.queues.redis.shares.MEND_AFTER", 0.0)
    await asyncio.gather(queue.sweep(), other.sweep())
    assert await missing(queue) == 0
    more = await statuses(queue, [make_submission() for _ in range(9)])
    assert more[SubmitStatus.OK] == 2


def test_shares_add_up() -> None:
    for limit in (0, 1, 2, 3, 100, 1023):
        for count in (1, 2, 3, 7):
            parts = [share(limit, shard, count) for shard in range(count)]
            assert sum(parts) == limit
            assert max(parts) - min(parts) <= 1


# --- who looks where ------------------------------------------------------------------------
async def test_each_of_many_shards_is_served_by_every_engine(redis_server: RedisServer) -> None:
    """More shards than an engine has of its own: those of others are not starved."""
    queue = open_redis(f"{redis_server.url}?shards=12", WIDE)
    try:
        submissions = [make_submission(identifier=at_slot(i, i)) for i in range(24)]
        for each in submissions:
            await queue.submit(each)
        found: set[str] = set()
        while len(found) < 24:
            claims = await queue.claim(make_engine(), limit=1, wait=5.0)
            found |= {claim.request.id for claim in claims}
        assert found == {each.requests[0].id for each in submissions}
        assert await queue.claim(make_engine(), limit=4, wait=0) == []
    finally:
        await queue.close()
