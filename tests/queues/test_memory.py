"""The queue in memory: the contract, on a clock of its own, and its bounds."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from service.errors import StartupError
from service.messages import FinishReason
from service.queues import open_queue
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.queues.builders import claim_one, finish, make_engine, make_submission
from tests.queues.contract import LIMITS, Passes, QueueContract
from tests.support.waiting import PATIENCE


class Clock:
    """Seconds that only `pass_by` moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> MemoryQueue:
    return MemoryQueue(LIMITS, clock=clock)


@pytest.fixture
def passes(clock: Clock) -> Passes:
    return clock.pass_by


class TestMemoryQueue(QueueContract):
    """All of the contract."""


async def test_everything_ended_is_forgotten(clock: Clock) -> None:
    """Memory holds what is live and what is in its resume window, and no more."""
    queue = MemoryQueue(replace(LIMITS, idempotency_ttl=2.0), clock=clock)
    for turn in range(50):
        assert (await queue.submit(make_submission(2, key=f"k{turn}"))).status == "ok"
        for claim in await queue.claim(make_engine(), limit=2, wait=0):
            await finish(queue, claim, length=2)
        await clock.pass_by(0.1)
    assert len(queue._groups) <= LIMITS.resume_window / 0.1 + 1
    assert len(queue._entries) == 2 * len(queue._groups)
    assert len(queue._submissions._keys) <= 2.0 / 0.1 + 1
    await clock.pass_by(3)
    await queue.sweep()
    assert not queue._running
    assert not len(queue._submissions)
    assert not len(queue._machine.tenants)


async def test_what_is_evicted_stays_for_its_resume_window(clock: Clock) -> None:
    queue = MemoryQueue(LIMITS, clock=clock)
    kept = [make_submission(keep=100.0, sent="x" * 9_000) for _ in range(3)]
    for submission in kept:
        assert (await queue.submit(submission)).status == "ok"
        await finish(queue, await claim_one(queue), length=2)
        await clock.pass_by(0.1)
    assert await queue.read_input(kept[0].id) is None
    await clock.pass_by(LIMITS.resume_window - 0.31)
    assert await queue.lookup(kept[0].id) is not None
    await clock.pass_by(0.02)
    assert await queue.lookup(kept[0].id) is None
    for _ in range(50):
        await queue.touch([kept[1].id])
        await clock.pass_by(60)
    assert [await queue.lookup(each.id) is not None for each in kept] == [False, True, False]
    assert len(queue._submissions._expiring) == 1
    await clock.pass_by(100)
    await queue.sweep()
    assert not len(queue._submissions)


async def test_an_idempotency_key_runs_out(clock: Clock) -> None:
    queue = MemoryQueue(replace(LIMITS, idempotency_ttl=2.0), clock=clock)
    await queue.submit(make_submission(key="k"))
    await clock.pass_by(2.1)
    assert (await queue.submit(make_submission(key="k", fingerprint="new"))).status == "ok"


async def test_without_a_deadline_a_request_waits_for_an_engine_so_long(clock: Clock) -> None:
    queue = MemoryQueue(LIMITS, clock=clock)
    submission = make_submission(2)
    await queue.submit(submission)
    claim = await claim_one(queue)
    await clock.pass_by(LIMITS.live_ttl + 0.1)
    await queue.renew([claim.lease])
    assert await queue.sweep() == 1
    assert (await queue.read(submission.requests[1].id))[-1].reason is FinishReason.DEADLINE  # type: ignore[union-attr]  # an End: the only record


async def test_an_orphan_is_taken_by_an_engine_that_waits_already() -> None:
    """By the real clock: the wait ends with the lease, not with its own time."""
    queue = MemoryQueue(replace(LIMITS, lease=0.1))
    await queue.submit(make_submission())
    await claim_one(queue, make_engine("dead"))
    async with asyncio.timeout(PATIENCE):
        assert (await claim_one(queue, make_engine("other"), wait=2 * PATIENCE)).attempt == 2


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StartupError, match="memory"):
        open_queue("amqp://user:secret@host", QueueLimits())
