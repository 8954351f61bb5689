"""FairPool: turns, bounds and cancellation, counted in turns and not in seconds."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from service.errors import RateLimited, Unavailable
from service.fair_pool import FairPool
from tests.support.waiting import PATIENCE


class Gate:
    """Work that waits until the test lets it end; records the order in which it began."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.allowed = threading.Semaphore(0)
        self.news = threading.Condition()

    def unit(self, name: str) -> Callable[[], str]:
        def work() -> str:
            with self.news:
                self.began.append(name)
                self.news.notify_all()
            assert self.allowed.acquire(timeout=PATIENCE)
            return name

        return work

    async def has_begun(self, count: int) -> None:
        def wait() -> bool:
            with self.news:
                return self.news.wait_for(lambda: len(self.began) >= count, timeout=PATIENCE)

        assert await asyncio.to_thread(wait)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.allowed.release(1000)


@pytest.mark.parametrize("threads", [1, 2])
async def test_a_rested_tenant_waits_for_what_runs_only(gate: Gate, threads: int) -> None:
    """A pool in the order of arrival served eleven units of the flood first."""
    pool = FairPool("work", threads=threads)
    flood = [asyncio.create_task(pool.run("flood", gate.unit("flood"))) for _ in range(12)]
    await gate.has_begun(threads)
    small = asyncio.create_task(pool.run("quiet", gate.unit("quiet")))
    await asyncio.sleep(0)
    assert pool.waiting == 12 - threads + 1
    gate.allowed.release()
    await gate.has_begun(threads + 1)
    assert gate.began == ["flood"] * threads + ["quiet"]
    gate.allowed.release(20)
    assert await small == "quiet"
    await asyncio.gather(*flood)
    pool.close()


async def test_turns_are_equal_whatever_each_has_waiting(gate: Gate) -> None:
    pool = FairPool("work", threads=1)
    calls = [
        asyncio.create_task(pool.run(name, gate.unit(name)))
        for name, count in (("a", 9), ("b", 3), ("c", 3))
        for _ in range(count)
    ]
    gate.allowed.release(20)
    await asyncio.gather(*calls)
    after_the_first = gate.began[1:10]
    assert all(set(after_the_first[i : i + 3]) == {"a", "b", "c"} for i in (0, 3))
    assert Counter(gate.began) == {"a": 9, "b": 3, "c": 3}
    pool.close()


async def test_what_waits_is_bounded_for_each_tenant_and_in_all(gate: Gate) -> None:
    pool = FairPool("work", threads=1, max_weight=25, max_tenant_weight=10)
    running = asyncio.create_task(pool.run("a", gate.unit("a"), weight=10))
    await gate.has_begun(1)
    waiting = [
        asyncio.create_task(pool.run(name, gate.unit(name), weight=10)) for name in ("a", "b")
    ]
    await asyncio.sleep(0)
    with pytest.raises(RateLimited, match="your calls are waiting for work"):
        await pool.run("a", gate.unit("a"))
    with pytest.raises(Unavailable, match="too many calls are waiting for work"):
        await pool.run("c", gate.unit("c"), weight=6)
    waiting.append(asyncio.create_task(pool.run("c", gate.unit("c"), weight=5)))
    gate.allowed.release(4)
    await asyncio.gather(running, *waiting)
    gate.allowed.release()
    assert await pool.run("a", gate.unit("a"), weight=10) == "a", "nothing stays counted"
    running = asyncio.create_task(pool.run("a", gate.unit("a")))
    await gate.has_begun(5)
    large = asyncio.create_task(pool.run("a", gate.unit("large"), weight=99))
    await asyncio.sleep(0)
    with pytest.raises(RateLimited):
        await pool.run("a", gate.unit("a"))
    gate.allowed.release(2)
    assert (await running, await large) == ("a", "large"), "one call always fits"
    pool.close()


async def test_a_cancelled_call_leaves_its_line(gate: Gate) -> None:
    """Its weight goes with it at once, while the thread is still busy."""
    pool = FairPool("work", threads=1, max_tenant_weight=10)
    running = asyncio.create_task(pool.run("a", gate.unit("running")))
    await gate.has_begun(1)
    left = asyncio.create_task(pool.run("a", gate.unit("left"), weight=10))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    assert pool.waiting == 0
    next_one = asyncio.create_task(pool.run("a", gate.unit("next"), weight=10))
    gate.allowed.release(2)
    assert (await running, await next_one) == ("running", "next")
    assert gate.began == ["running", "next"]
    pool.close()


async def test_a_call_that_leaves_while_it_runs_keeps_its_thread(gate: Gate) -> None:
    """The thread cannot be stopped: a second one would be more work than the pool may do."""
    pool = FairPool("work", threads=1)
    left = asyncio.create_task(pool.run("a", gate.unit("left")))
    await gate.has_begun(1)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    after = asyncio.create_task(pool.run("a", gate.unit("after")))
    await asyncio.sleep(0.01)
    assert gate.began == ["left"]
    gate.allowed.release(2)
    assert await after == "after"
    pool.close()


async def test_errors_reach_the_caller_and_free_the_thread() -> None:
    pool = FairPool("work", threads=1)

    def fail() -> None:
        raise KeyError("x")

    for _ in range(3):
        with pytest.raises(KeyError):
            await pool.run("a", fail)
    assert await pool.run("a", lambda: 1) == 1
    pool.close()


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_lost_or_counted_in_the_end(seed: int) -> None:
    """A random walk of calls, some of them cancelled."""
    draw = random.Random(seed)
    pool = FairPool("work", threads=2, max_weight=10**6)
    calls = []
    for index in range(200):
        work = pool.run(draw.choice("abc"), partial(int, index), weight=draw.randint(1, 9))
        calls.append(asyncio.create_task(work))
        if draw.random() < 0.3:
            draw.choice(calls).cancel()
        if draw.random() < 0.2:
            await asyncio.sleep(0)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(
        result == index or isinstance(result, asyncio.CancelledError)
        for index, result in enumerate(results)
    )
    async with asyncio.timeout(PATIENCE):
        while pool._running.total():
            await asyncio.sleep(0.001)
    assert (pool._queues, pool._waiting, pool._served) == ({}, {}, {})
    pool.close()
