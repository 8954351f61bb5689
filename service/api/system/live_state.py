"""LiveState: queue depth and engines, read from the queue a few times per second at most."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Annotated

from fastapi import Depends, Request

from service.errors import Unavailable
from service.queues.contract import EngineInfo, Queue, QueueDepth

MAX_AGE = 0.2  # seconds for which callers share a reading


class LiveState:
    """The requests that are running and waiting now, or MAX_AGE ago."""

    def __init__(self, queue: Queue, *, clock: Callable[[], float] = monotonic) -> None:
        self._queue = queue
        self._clock = clock
        self._reading = asyncio.Lock()
        self._read_at: float | None = None
        self._latest: tuple[QueueDepth, Sequence[EngineInfo]] | None = None

    async def read(self) -> tuple[QueueDepth, Sequence[EngineInfo]] | None:
        """Returns depth and engines; None if the queue is unreachable."""
        async with self._reading:
            if self._read_at is None or self._clock() - self._read_at >= MAX_AGE:
                try:
                    self._latest = await self._queue.depth(), await self._queue.engines()
                except Unavailable:
                    self._latest = None
                self._read_at = self._clock()
        return self._latest


async def _live_state(request: Request) -> LiveState:
    state = request.app.state.live
    assert isinstance(state, LiveState)  # noqa: S101  # build_app puts it there
    return state


Live = Annotated[LiveState, Depends(_live_state)]
