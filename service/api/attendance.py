"""Attendance: who reads which answer on this replica, and what happens when nobody does.

An answer that is left before its end is cancelled: at once, after a grace in which a new reader
keeps it alive, or never. Readers on other replicas are not seen from here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from service.errors import Unavailable
from service.messages import FinishReason

log = logging.getLogger(__name__)

Stop = Callable[[Sequence[str], FinishReason], Awaitable[None]]


class Attendance:
    """Readers by submission id, and the timers of those that were left."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._readers: dict[str, int] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._stopping: set[asyncio.Task[None]] = set()

    def enter(self, call_id: str) -> None:
        """Somebody reads an answer."""
        self._readers[call_id] = self._readers.get(call_id, 0) + 1
        timer = self._timers.pop(call_id, None)
        if timer is not None:
            timer.cancel()

    def leave(self, call_id: str) -> bool:
        """A reader is gone; whether it was the last."""
        self._readers[call_id] -= 1
        if self._readers[call_id]:
            return False
        del self._readers[call_id]
        return True

    def abandon(self, call_id: str, request_ids: Sequence[str], *, grace: float | None) -> None:
        """Nobody reads it, and it has not ended. `grace` None: let it go on."""
        if grace is None:
            return
        if grace == 0:
            self._begin_stop(request_ids)
            return
        loop = asyncio.get_running_loop()
        self._timers[call_id] = loop.call_later(grace, self._expire, call_id, request_ids)

    def close(self) -> None:
        """Drops the timers: this replica goes away, and readers may go on at another."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _expire(self, call_id: str, request_ids: Sequence[str]) -> None:
        del self._timers[call_id]
        self._begin_stop(request_ids)

    def _begin_stop(self, request_ids: Sequence[str]) -> None:
        # A task of its own: the handler that found the reader gone may be cancelled at any time.
        task = asyncio.create_task(self._cancel(request_ids))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _cancel(self, request_ids: Sequence[str]) -> None:
        try:
            await self._stop(request_ids, FinishReason.CANCELLED)
        except Unavailable:
            log.warning("a deserted answer could not be cancelled: the queue is away")
