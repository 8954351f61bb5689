"""Attendance: who reads which answer on this replica, as this replica tells the queue.

The queue cancels an answer that no replica has attended for its grace, so a reader may leave one
replica and go on at another, and a replica may die. From here only those answers are cancelled
whose one caller is known to be gone and not to come back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from service.errors import Unavailable
from service.messages import FinishReason
from service.queues.contract import Queue

log = logging.getLogger(__name__)

RETRY = 0.25
"""Seconds after which an absent queue is told again."""


class Attendance:
    """Readers by submission id."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._readers: dict[str, int] = {}
        self._stopping: set[asyncio.Task[None]] = set()

    @property
    def attended(self) -> Sequence[str]:
        """The answers that are read here now."""
        return [*self._readers]

    def enter(self, call_id: str) -> None:
        """Somebody reads an answer."""
        self._readers[call_id] = self._readers.get(call_id, 0) + 1

    def leave(self, call_id: str) -> bool:
        """A reader is gone; whether it was the last here."""
        self._readers[call_id] -= 1
        if self._readers[call_id]:
            return False
        del self._readers[call_id]
        return True

    async def run(self, interval: float) -> None:
        """Tells the queue, for ever, each `interval` seconds."""
        while True:
            pause = interval
            try:
                if self._readers:
                    await self._queue.heartbeat(self.attended)
            except Unavailable:
                pause = min(interval, RETRY)
            await asyncio.sleep(pause)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Nobody wants these any more."""
        # A task of its own: the handler that found the reader gone may be cancelled at any time.
        task = asyncio.create_task(self._stop(request_ids))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _stop(self, request_ids: Sequence[str]) -> None:
        try:
            await self._queue.stop(request_ids, FinishReason.CANCELLED)
        except Unavailable:
            log.warning("a deserted answer is left to its grace: the queue is away")
