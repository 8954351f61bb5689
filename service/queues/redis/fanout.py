"""FanOut: calls several shards at once, so that one that does not answer delays no other.

A shard is *away* from its first call that fails until one succeeds again. While a call to it is in
flight there is no second one: the shard counts as unavailable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from service.errors import Unavailable

T = TypeVar("T")
Call = Callable[[], Coroutine[Any, Any, T]]

LATE = 1.0
"""Seconds after the reply of one shard for which those of others are awaited."""
AWAY_WAIT = 0.1
"""Seconds for which the reply of a shard that is away is awaited."""


class FanOut:
    """`probe` is a call that shows whether a shard is back."""

    def __init__(self, probe: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        self._probe = probe
        self._away: set[int] = set()
        self._in_flight: dict[asyncio.Task[Any], int] = {}  # calls that nothing waits for: shard
        self.closed = False

    def lost(self, shard: int) -> None:
        """It did not answer a call that was not made here."""
        self._away.add(shard)

    def is_there(self, shard: int) -> bool:
        """Whether its last call succeeded. Finds out in the background whether it is back."""
        if shard in self._away and not (self._is_called(shard) or self.closed):
            self._leave(shard, asyncio.create_task(self._called(shard, lambda: self._probe(shard))))
        return shard not in self._away

    async def one(self, shard: int, call: Call[T]) -> T:
        """Calls one shard, for as long as that takes. Raises Unavailable."""
        return await self._called(shard, call)

    async def all(self, calls: Mapping[int, Call[T]]) -> dict[int, T | Unavailable]:
        """The replies of the shards, or why there is none. Calls must be idempotent: one that takes
        too long goes on and its reply is dropped.
        """
        replies: dict[int, T | Unavailable] = {}
        tasks: dict[asyncio.Task[T], int] = {}
        for shard, call in calls.items():
            if self._is_called(shard):
                replies[shard] = _unanswered()
            else:
                tasks[asyncio.create_task(self._called(shard, call))] = shard
        try:
            await self._wait(tasks)
        except asyncio.CancelledError:
            for task, shard in tasks.items():
                task.cancel()
                self._leave(shard, task)
            raise
        for task, shard in tasks.items():
            if not task.done():
                self._away.add(shard)
                self._leave(shard, task)
                replies[shard] = _unanswered()
            elif isinstance(error := task.exception(), Unavailable):
                replies[shard] = error
            else:
                replies[shard] = task.result()
        return replies

    async def _called(self, shard: int, call: Call[T]) -> T:
        try:
            reply = await call()
        except Unavailable as error:
            if error.code != "storage_full":
                self._away.add(shard)
            raise
        self._away.discard(shard)
        return reply

    async def _wait(self, tasks: Mapping[asyncio.Task[T], int]) -> None:
        """Until all are done, or those that are not are late."""
        loop = asyncio.get_running_loop()
        pending, limit = set(tasks), None
        away_limit = loop.time() + AWAY_WAIT
        while pending:
            if all(tasks[task] in self._away for task in pending):
                limit = away_limit if limit is None else min(limit, away_limit)
            left = None if limit is None else max(0.0, limit - loop.time())
            done, pending = await asyncio.wait(
                pending, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                return
            if limit is None and any(task.exception() is None for task in done):
                limit = loop.time() + LATE

    def _is_called(self, shard: int) -> bool:
        return shard in self._in_flight.values()

    def _leave(self, shard: int, task: asyncio.Task[Any]) -> None:
        self._in_flight[task] = shard
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[Any]) -> None:
        del self._in_flight[task]
        if not task.cancelled():
            task.exception()  # retrieved

    async def close(self) -> None:
        """Cancels the calls whose callers have left."""
        self.closed = True
        while tasks := list(self._in_flight):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)
            await asyncio.sleep(0)  # they are removed


def _unanswered() -> Unavailable:
    return Unavailable(
        "the journal's store does not answer", code="backend_unavailable", retry_after=2.0
    )
