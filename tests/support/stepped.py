"""Queues whose clock moves with the steps of an engine: a machine that stands still for a while
ends no lease and no grace period.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.queues.contract import QueueLimits, Write, WriteReply
from service.queues.memory.queue import MemoryQueue
from service.queues.redis.queue import RedisQueue
from service.queues.redis.servers import shards_of
from tests.cluster.redis_process import RedisServer

STEP = 0.033
"""Seconds that pass with each write; engines pause for so long between two."""


class SteppedQueue(MemoryQueue):
    """In memory."""

    def __init__(self, limits: QueueLimits) -> None:
        self.now = 0.0
        super().__init__(limits, clock=lambda: self.now)

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        self.now += STEP
        return await super().write(writes)


class SteppedRedisQueue(RedisQueue):
    """Over a server with a frozen clock."""

    def __init__(self, limits: QueueLimits, server: RedisServer) -> None:
        super().__init__(limits, shard=shards_of(server.url)[0])
        self._server = server

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        self._server.advance(STEP)
        return await super().write(writes)
