"""JournalReader: reads and follows answers in Redis. Writes only which mailboxes follow them.

Followers get new records from the process's mailbox. One that got none for `LOOK_AGAIN` reads the
journal, and then also checks whether the request still exists.

A page is a decoded part of a journal that is read from Redis once for many readers. Page k has the
records that end at tokens `k * PAGE_TOKENS + 1 .. (k + 1) * PAGE_TOKENS`. `PageCache` keeps the
pages to which nothing can be added, up to `CACHE_BYTES`; so memory depends neither on the number of
readers nor on their speed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import NotFound, StreamDivergence, Unavailable
from service.messages import End, Record
from service.queues.contract import PAGE_TOKENS
from service.queues.redis.codec import Malformed, decode_entry
from service.queues.redis.connection import Command, RedisClient, backoff
from service.queues.redis.keys import ShardKeys
from service.queues.redis.mailbox import MAX_READERS, Mailbox
from service.queues.waiting import woken_within

LOOK_AGAIN = 0.7
"""Seconds without a message after which a follower reads the journal."""
BATCH = 512
"""Records that `read` and `follow` request at a time."""
CACHE_BYTES = 32 * 2**20
"""Bound on the memory of the cached pages: about 100,000 records without log probabilities."""
RECORD_BYTES = 300  # of a decoded record
GROWTH = 9  # bytes of memory per byte in Redis: numbers become objects


@dataclass(frozen=True, slots=True)
class JournalState:
    """Whether a request has ended, and the number of tokens in its journal."""

    ended: bool
    count: int


@dataclass(frozen=True, slots=True)
class Page:
    """A page as it was read: `state` is not newer than the records."""

    state: JournalState
    records: Sequence[Record]
    stored_bytes: int

    @property
    def size(self) -> int:
        """Estimated bytes of memory."""
        return GROWTH * self.stored_bytes + RECORD_BYTES * (1 + len(self.records))


Entry = tuple[bytes, dict[bytes, bytes]]
Fetch = Callable[[str, int], Awaitable[Page]]
PageKey = tuple[str, int]


class PageCache:
    """Complete pages by request and number, least recently used first. `fetch` reads one."""

    def __init__(self, fetch: Fetch, *, max_bytes: int = CACHE_BYTES) -> None:
        self._fetch = fetch
        self._max_bytes = max_bytes
        self._pages: OrderedDict[PageKey, Page] = OrderedDict()
        self._size = 0
        self._fetching: dict[PageKey, asyncio.Task[Page]] = {}

    def get(self, request_id: str, number: int) -> Page | None:
        """The page, if it is cached."""
        page = self._pages.get((request_id, number))
        if page is not None:
            self._pages.move_to_end((request_id, number))
        return page

    async def read(self, request_id: str, number: int) -> Page:
        """Reads the page; concurrent callers share the reply."""
        key = (request_id, number)
        fetching = self._fetching.get(key)
        if fetching is None:
            fetching = asyncio.create_task(self._read(key))
            self._fetching[key] = fetching
            fetching.add_done_callback(lambda task: self._fetched(key, task))
        return await asyncio.shield(fetching)

    async def _read(self, key: PageKey) -> Page:
        page = await self._fetch(*key)
        if page.state.ended or page.state.count >= (key[1] + 1) * PAGE_TOKENS:
            self._keep(key, page)
        return page

    def _fetched(self, key: PageKey, task: asyncio.Task[Page]) -> None:
        del self._fetching[key]
        if not task.cancelled():
            task.exception()  # retrieved, also if all callers were cancelled

    def _keep(self, key: PageKey, page: Page) -> None:
        before = self._pages.pop(key, None)
        self._size += page.size - (0 if before is None else before.size)
        self._pages[key] = page
        while self._size > self._max_bytes:
            _, dropped = self._pages.popitem(last=False)
            self._size -= dropped.size


class JournalReader:
    """Calls `dropped` with a description of each entry that is not a record."""

    def __init__(
        self,
        client: RedisClient,
        mailbox: Mailbox,
        keys: ShardKeys,
        *,
        dropped: Callable[[str], None],
    ) -> None:
        self._client = client
        self._mailbox = mailbox
        self._keys = keys
        self._dropped = dropped
        self._cache = PageCache(self._fetch_page)
        self._closed = False

    def close(self) -> None:
        """Open follows raise Unavailable when they are next woken."""
        self._closed = True

    async def read(self, request_id: str, *, after: int) -> Sequence[Record]:
        """See `Queue.read`."""
        records: list[Record] = []
        full = True
        while full:
            batch, full, _ = await self._batch(
                request_id, self._state_command(request_id), after=after
            )
            records += batch
            after = position_of(batch[-1]) if batch else after
        return records

    async def read_page(self, request_id: str, *, after: int) -> Sequence[Record]:
        """See `Queue.read_page`."""
        number = after // PAGE_TOKENS
        while True:
            page = self._cache.get(request_id, number)
            if page is None:
                page = await self._cache.read(request_id, number)
                state = page.state
            else:
                state = _state_of((await self._client.read(self._state_command(request_id)))[0])
            _check_length(state, after)
            records = [record for record in page.records if _is_beyond(record, after)]
            number += 1
            if records or number > state.count // PAGE_TOKENS:
                return records

    async def _fetch_page(self, request_id: str, number: int) -> Page:
        """One pipeline: a page that is complete by the state is complete when it is read."""
        self._raise_if_closed()
        first = f"({number * PAGE_TOKENS}-0" if number else "-"
        last = f"{(number + 1) * PAGE_TOKENS}-0"
        state, entries = await self._client.read(
            self._state_command(request_id), ("XRANGE", self._keys.journal(request_id), first, last)
        )
        return Page(
            _state_of(state),
            self._decoded(entries),
            stored_bytes=sum(len(value) for _, fields in entries for value in fields.values()),
        )

    async def follow(self, request_id: str, *, after: int) -> AsyncIterator[Record]:
        """Survives an outage of Redis. Raises NotFound also if Redis lost the request, and
        StreamDivergence if it has ended before what was already yielded.
        """
        inbox = self._mailbox.open(request_id)
        entered = False  # whether the scripts send new records here
        try:
            while True:
                if not inbox.outdated and not inbox.records:
                    inbox.news.clear()
                    if not await woken_within(LOOK_AGAIN, inbox.news):
                        inbox.miss()
                if inbox.outdated:
                    inbox.outdated = False
                    state = self._state_command(request_id, enter=not entered)
                    records, full, readers = await self._retried_batch(
                        request_id, state, after=after
                    )
                    entered = self._mailbox.name.encode() in readers
                    if full:
                        inbox.miss()
                else:
                    records = inbox.take(after)
                for record in records:
                    yield record
                    after = position_of(record)
                    if isinstance(record, End):
                        return
        finally:
            self._mailbox.close(request_id, inbox)

    async def _retried_batch(
        self, request_id: str, state: Command, *, after: int
    ) -> tuple[Sequence[Record], bool, bytes]:
        delays = backoff(longest=1.0)
        while True:
            try:
                return await self._batch(request_id, state, after=after)
            except Unavailable:
                if self._closed:
                    raise
                await asyncio.sleep(next(delays))

    async def _batch(
        self, request_id: str, state: Command, *, after: int
    ) -> tuple[Sequence[Record], bool, bytes]:
        """Records beyond `after` tokens, whether there are more now, and the mailboxes that get new
        ones. `state` is a command that replies with the request's state.
        """
        self._raise_if_closed()
        reply, entries = await self._client.read(
            state, ("XRANGE", self._keys.journal(request_id), f"({after}-0", "+", "COUNT", BATCH)
        )
        records = self._decoded(entries)
        if not records:
            _check_length(_state_of(reply), after)
        return records, len(entries) == BATCH and bool(records), reply[2] or b""

    def _state_command(self, request_id: str, *, enter: bool = False) -> Command:
        """Also enters this process's mailbox among those that get new records, if asked to."""
        if not enter:
            return ("HMGET", self._keys.request(request_id), "st", "n", "rd")
        return self._client.script(
            "follow",
            self._keys.admission,
            request=request_id,
            mailbox=self._mailbox.name,
            max_readers=MAX_READERS,
        )

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise Unavailable("the queue was closed", code="backend_unavailable")

    def _decoded(self, entries: Sequence[Entry]) -> Sequence[Record]:
        records: list[Record] = []
        for entry in entries:
            try:
                records.append(decode_entry(*entry))
            except Malformed as error:
                self._dropped(str(error))
        return records


def _state_of(reply: Any) -> JournalState:  # noqa: ANN401  # a reply of the client library
    status, count, _ = reply
    if status is None:
        raise NotFound("no such request, or its resume window is over")
    return JournalState(ended=status == b"ended", count=int(count or 0))


def _check_length(state: JournalState, after: int) -> None:
    if state.ended and state.count < after:
        raise StreamDivergence("the journal ends before what was sent already")


def _is_beyond(record: Record, after: int) -> bool:
    return record.count >= after if isinstance(record, End) else record.end > after


def position_of(record: Record) -> int:
    """Tokens of the answer up to and including this record."""
    return record.count if isinstance(record, End) else record.end
