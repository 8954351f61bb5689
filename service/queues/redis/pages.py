"""Pages: decoded parts of journals that many readers want, read from Redis once for all of them.

Page k of a journal has the records that end at tokens `k * PAGE_TOKENS + 1 .. (k + 1) *
PAGE_TOKENS`. A page to which nothing can be added is kept; those used least recently are dropped
when all together need more than `KEPT_BYTES`. So memory depends neither on the number of readers
nor on their speed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from service.messages import Record
from service.queues.contract import PAGE_TOKENS
from service.queues.redis.keys import ShardKeys

KEPT_BYTES = 32 * 2**20
"""Bound on the memory of the kept pages: about 100,000 records without log probabilities."""
RECORD_BYTES = 300  # of a decoded record
GROWTH = 9  # bytes of memory per byte in Redis: numbers become objects


@dataclass(frozen=True, slots=True)
class State:
    """Whether a request has ended, and the number of tokens in its journal."""

    ended: bool
    count: int


@dataclass(frozen=True, slots=True)
class Page:
    """One page, as it was read: `state` is not newer than the records."""

    state: State
    records: Sequence[Record]
    stored_bytes: int

    @property
    def size(self) -> int:
        """Estimated bytes of memory."""
        return GROWTH * self.stored_bytes + RECORD_BYTES * (1 + len(self.records))


Fetch = Callable[[ShardKeys, str, int], Awaitable[Page]]
Key = tuple[str, int]


class Pages:
    """Kept pages by request and number. `fetch` reads one."""

    def __init__(self, fetch: Fetch, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._fetch = fetch
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[Key, Page] = OrderedDict()  # least recently used first
        self._size = 0
        self._fetching: dict[Key, asyncio.Task[Page]] = {}

    def kept(self, request_id: str, number: int) -> Page | None:
        """The page, if it is in memory and complete."""
        page = self._kept.get((request_id, number))
        if page is not None:
            self._kept.move_to_end((request_id, number))
        return page

    async def read(self, keys: ShardKeys, request_id: str, number: int) -> Page:
        """The page, read now; callers that ask for it meanwhile wait for the same reply."""
        key = (request_id, number)
        fetching = self._fetching.get(key)
        if fetching is None:
            fetching = asyncio.create_task(self._read(keys, key))
            self._fetching[key] = fetching
            fetching.add_done_callback(lambda task: self._fetched(key, task))
        return await asyncio.shield(fetching)

    async def _read(self, keys: ShardKeys, key: Key) -> Page:
        page = await self._fetch(keys, *key)
        if page.state.ended or page.state.count >= (key[1] + 1) * PAGE_TOKENS:
            self._keep(key, page)
        return page

    def _fetched(self, key: Key, task: asyncio.Task[Page]) -> None:
        del self._fetching[key]
        if not task.cancelled():
            task.exception()  # retrieved, also if all callers were cancelled

    def _keep(self, key: Key, page: Page) -> None:
        before = self._kept.pop(key, None)
        self._size += page.size - (0 if before is None else before.size)
        self._kept[key] = page
        while self._size > self._kept_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._size -= dropped.size
