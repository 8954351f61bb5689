"""One HTTP call: its id, work that ends when its client is gone, and the readers of its answer.

Call ids are `s0-<32 hex digits of a version 7 UUID>` (RFC 9562). They sort by time.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from service.errors import Unavailable
from service.messages import FinishReason
from service.queues.contract import Queue, slot_of

T = TypeVar("T")

DROP = "drop_connection"
"""Key in `scope["state"]` of a function that closes the connection and drops what is unsent."""

HEAD_ONLY = "head_only"
"""Key in `scope["state"]`, true for a HEAD request: routes see a GET, and no body is sent."""

LINE = "line"
"""Key in `scope["state"]`, true for a line of a batch: a call that this process makes itself. Its
tenant is in `state`, too. Clients cannot set either.
"""

_CALL_ID = re.compile(r"s[0-9]{1,4}-([0-9a-f]{12})7[0-9a-f]{3}[89ab][0-9a-f]{15}")


def new_call_id(*, idempotency_key: str | None = None) -> str:
    """A new id: 48 bits of Unix milliseconds, then 74 unguessable random bits, or 58 and the slot
    of the call's idempotency key.
    """
    milliseconds = time.time_ns() // 1_000_000
    random_a = 0x7000 | secrets.randbits(12)
    random_b = 0b10 << 62 | secrets.randbits(62)
    if idempotency_key is not None:
        random_b = random_b >> 16 << 16 | slot_of(idempotency_key)
    return f"s0-{milliseconds:012x}{random_a:04x}{random_b:016x}"


def call_age(call_id: str) -> float | None:
    """Seconds since an id was made, by this host's clock; None if it is no id."""
    match = _CALL_ID.fullmatch(call_id)
    return None if match is None else time.time() - int(match[1], 16) / 1000


async def unless_gone(
    work: Coroutine[Any, Any, T], receive: Receive, *, closing: asyncio.Event
) -> T | None:
    """The result of `work`; None if the client left or `closing` was set before: then `work` is
    cancelled.
    """
    working = asyncio.create_task(work)
    await first_of(working, asyncio.create_task(gone(receive)), asyncio.create_task(closing.wait()))
    return None if working.cancelled() else working.result()


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(*tasks: asyncio.Task[Any]) -> None:
    """Waits for the first task to end, cancels the others, and raises what the first one raised."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


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
