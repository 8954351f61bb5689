"""Readers: which answers are being read on this replica, reported to the queue in heartbeats.

The queue cancels an answer that no replica has reported for its grace period, so a reader may leave
one replica and continue at another, and a replica may die. This replica itself cancels only those
answers whose one client has left and cannot come back.
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
"""Seconds until the next heartbeat while the queue is unavailable."""


class Readers:
    """Number of readers per submission id."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._readers: dict[str, int] = {}
        self._stopping: set[asyncio.Task[None]] = set()

    @property
    def ids(self) -> Sequence[str]:
        """The answers that have readers here."""
        return [*self._readers]

    def add(self, call_id: str) -> None:
        """Counts one more reader of an answer."""
        self._readers[call_id] = self._readers.get(call_id, 0) + 1

    def remove(self, call_id: str) -> bool:
        """Counts one reader less; returns whether it was the last one here."""
        self._readers[call_id] -= 1
        if self._readers[call_id]:
            return False
        del self._readers[call_id]
        return True

    async def send_heartbeats(self, interval: float) -> None:
        """Reports the answers to the queue every `interval` seconds, until it is cancelled."""
        while True:
            pause = interval
            try:
                if self._readers:
                    await self._queue.heartbeat(self.ids)
            except Unavailable:
                pause = min(interval, RETRY)
            await asyncio.sleep(pause)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Cancels abandoned requests in the background."""
        # A task of its own: the handler that found the client gone may be cancelled at any time.
        task = asyncio.create_task(self._stop(request_ids))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _stop(self, request_ids: Sequence[str]) -> None:
        try:
            await self._queue.stop(request_ids, FinishReason.CANCELLED)
        except Unavailable:
            log.warning("the queue is unavailable: an abandoned answer runs to its grace period")
