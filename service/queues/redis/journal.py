"""JournalReader: reads and follows answers in Redis. Writes nothing.

The journal's stream is authoritative, pub/sub only wakes followers: one that was not woken looks
again after `LOOK_AGAIN`, and then also checks whether the request still exists.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from service.errors import NotFound, StreamDivergence, Unavailable
from service.messages import End, Record
from service.queues.contract import PAGE_TOKENS
from service.queues.redis.codec import Malformed, decode_entry
from service.queues.redis.connection import Command, Wire, backoff
from service.queues.redis.keys import ShardKeys
from service.queues.redis.pages import Page, Pages, State
from service.queues.redis.pubsub import Wakeups, woken_within

LOOK_AGAIN = 0.7
"""Seconds after which a follower reads without having been woken."""
BATCH = 512
"""Records that `read` and `follow` ask for at a time."""

Entry = tuple[bytes, dict[bytes, bytes]]


class JournalReader:
    """`dropped` is called with a description of each entry that is not a record."""

    def __init__(self, wire: Wire, wakeups: Wakeups, *, dropped: Callable[[str], None]) -> None:
        self._wire = wire
        self._wakeups = wakeups
        self._dropped = dropped
        self._pages = Pages(self._fetch_page)
        self._closed = False

    def close(self) -> None:
        """Open follows raise Unavailable when they are next woken."""
        self._closed = True

    async def read(self, keys: ShardKeys, request_id: str, *, after: int) -> Sequence[Record]:
        """The records beyond `after` tokens. Raises NotFound, StreamDivergence, Unavailable."""
        records: list[Record] = []
        full = True
        while full:
            batch, full = await self._batch(keys, request_id, after=after, with_state=not records)
            records += batch
            after = _position(batch[-1]) if batch else after
        return records

    async def read_page(self, keys: ShardKeys, request_id: str, *, after: int) -> Sequence[Record]:
        """See `Queue.read_page`. Raises as `read` does."""
        number = after // PAGE_TOKENS
        while True:
            page = self._pages.kept(request_id, number)
            if page is None:
                page = await self._pages.read(keys, request_id, number)
                state = page.state
            else:
                state = _state_of((await self._wire.read(_state_command(keys, request_id)))[0])
            if state.ended and state.count < after:
                raise StreamDivergence("the journal ends before what was sent already")
            records = [record for record in page.records if _is_beyond(record, after)]
            number += 1
            if records or number > state.count // PAGE_TOKENS:
                return records

    async def _fetch_page(self, keys: ShardKeys, request_id: str, number: int) -> Page:
        """One pipeline: a page that is complete by the state is complete when it is read."""
        self._refuse_if_closed()
        first = f"({number * PAGE_TOKENS}-0" if number else "-"
        last = f"{(number + 1) * PAGE_TOKENS}-0"
        state, entries = await self._wire.read(
            _state_command(keys, request_id), ("XRANGE", keys.journal(request_id), first, last)
        )
        return Page(
            _state_of(state),
            self._decoded(entries),
            stored_bytes=sum(len(value) for _, fields in entries for value in fields.values()),
        )

    async def follow(
        self, keys: ShardKeys, request_id: str, *, after: int
    ) -> AsyncIterator[Record]:
        """Outlives an outage of Redis. Raises NotFound also if Redis lost the request, and
        StreamDivergence if it has ended before what was already given out.
        """
        channel = keys.journal(request_id)
        news = asyncio.Event()

        def wake(_message: bytes) -> None:
            news.set()

        self._wakeups.watch(channel, wake)
        try:
            woken = False
            while True:
                news.clear()
                batch, full = await self._batch_at_last(
                    keys, request_id, after=after, with_state=not woken
                )
                for record in batch:
                    yield record
                    after = _position(record)
                    if isinstance(record, End):
                        return
                woken = full or await woken_within(LOOK_AGAIN, news)
        finally:
            self._wakeups.unwatch(channel, wake)

    async def _batch_at_last(
        self, keys: ShardKeys, request_id: str, *, after: int, with_state: bool
    ) -> tuple[Sequence[Record], bool]:
        delays = backoff(longest=1.0)
        while True:
            try:
                return await self._batch(keys, request_id, after=after, with_state=with_state)
            except Unavailable:
                if self._closed:
                    raise
                await asyncio.sleep(next(delays))

    async def _batch(
        self, keys: ShardKeys, request_id: str, *, after: int, with_state: bool
    ) -> tuple[Sequence[Record], bool]:
        """Records beyond `after` tokens, and whether there are more at once."""
        self._refuse_if_closed()
        commands: list[Command] = [
            ("XRANGE", keys.journal(request_id), f"({after}-0", "+", "COUNT", BATCH)
        ]
        if with_state:
            commands.append(_state_command(keys, request_id))
        entries, *states = await self._wire.read(*commands)
        records = self._decoded(entries)
        if with_state and not records:
            state = _state_of(states[0])
            if state.ended and state.count < after:
                raise StreamDivergence("the journal ends before what was sent already")
        return records, len(entries) == BATCH and bool(records)

    def _refuse_if_closed(self) -> None:
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


def _state_command(keys: ShardKeys, request_id: str) -> Command:
    return ("HMGET", keys.request(request_id), "st", "n")


def _state_of(reply: Any) -> State:  # noqa: ANN401  # a reply of the client library
    status, count = reply
    if status is None:
        raise NotFound("no such request, or its resume window is over")
    return State(ended=status == b"ended", count=int(count or 0))


def _is_beyond(record: Record, after: int) -> bool:
    return record.count >= after if isinstance(record, End) else record.end > after


def _position(record: Record) -> int:
    """Tokens of the answer with this record."""
    return record.count if isinstance(record, End) else record.end
