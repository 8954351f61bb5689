"""The live state: callers share a reading."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from service.api.system.health import MAX_AGE, LiveState
from service.errors import Unavailable
from service.queues.contract import EngineInfo, QueueDepth, QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.queues.builders import make_submission
from tests.support.waiting import PATIENCE


class CountedQueue(MemoryQueue):
    """Counts readings; fails them while `away`."""

    readings = 0
    away = False

    async def depth(self) -> QueueDepth:
        self.readings += 1
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("away")
        return await super().depth()

    async def engines(self) -> Sequence[EngineInfo]:
        return await super().engines()


async def test_many_calls_cost_one_reading() -> None:
    """So /status needs no rate limit: the load on the queue does not depend on its callers."""
    now = 0.0
    queue = CountedQueue(QueueLimits(lease=10 * PATIENCE))
    live = LiveState(queue, clock=lambda: now)
    states = await asyncio.gather(*(live.read() for _ in range(50)))
    assert queue.readings == 1
    assert all(state == states[0] for state in states)
    await queue.submit(make_submission())
    now += MAX_AGE
    state = await live.read()
    assert state is not None
    assert state[0].queued_requests == 1
    queue.away = True
    now += MAX_AGE
    assert await asyncio.gather(*(live.read() for _ in range(50))) == [None] * 50
    assert queue.readings == 3
