"""JournalReader: reads and follows answers in Redis. Writes nothing.

The journal's stream is the truth, pub/sub only says when to look: a follower that was not woken
looks again after `LOOK_AGAIN`, and then also whether the request still exists.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from service.errors import NotFound, StreamDivergence, Unavailable
from service.messages import End, Record
from service.queues.redis_codec import Malformed, decode_entry
from service.queues.redis_keys import ShardKeys
from service.queues.redis_wakeups import Wakeups, woken_within
from service.queues.redis_wire import Command, Wire, backoff

LOOK_AGAIN = 0.7
"""Seconds after which a follower reads without having been woken."""
PAGE = 512
"""Records read at a time."""


class JournalReader:
    """`dropped` is told of each entry that is not a record."""

    def __init__(self, wire: Wire, wakeups: Wakeups, *, dropped: Callable[[str], None]) -> None:
        self._wire = wire
        self._wakeups = wakeups
        self._dropped = dropped
        self._closed = False

    def close(self) -> None:
        """Open follows raise Unavailable when they are next woken."""
        self._closed = True

    async def read(self, keys: ShardKeys, request_id: str, *, after: int) -> Sequence[Record]:
        """The records beyond `after` tokens. Raises NotFound, StreamDivergence, Unavailable."""
        records: list[Record] = []
        full = True
        while full:
            page, full = await self._page(keys, request_id, after=after, with_state=not records)
            records += page
            after = _position(page[-1]) if page else after
        return records

    async def follow(
        self, keys: ShardKeys, request_id: str, *, after: int
    ) -> AsyncIterator[Record]:
        """Outlives an outage of Redis. Raises NotFound also where Redis lost the request, and
        StreamDivergence where it has ended before what was already given out.
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
                page, full = await self._page_at_last(
                    keys, request_id, after=after, with_state=not woken
                )
                for record in page:
                    yield record
                    after = _position(record)
                    if isinstance(record, End):
                        return
                woken = full or await woken_within(LOOK_AGAIN, news)
        finally:
            self._wakeups.unwatch(channel, wake)

    async def _page_at_last(
        self, keys: ShardKeys, request_id: str, *, after: int, with_state: bool
    ) -> tuple[list[Record], bool]:
        delays = backoff(longest=1.0)
        while True:
            try:
                return await self._page(keys, request_id, after=after, with_state=with_state)
            except Unavailable:
                if self._closed:
                    raise
                await asyncio.sleep(next(delays))

    async def _page(
        self, keys: ShardKeys, request_id: str, *, after: int, with_state: bool
    ) -> tuple[list[Record], bool]:
        """Records beyond `after` tokens, and whether there are more at once."""
        if self._closed:
            raise Unavailable("the queue was closed", code="backend_unavailable")
        commands: list[Command] = [
            ("XRANGE", keys.journal(request_id), f"({after}-0", "+", "COUNT", PAGE)
        ]
        if with_state:
            commands.append(("HMGET", keys.request(request_id), "st", "n"))
        entries, *state = await self._wire.read(*commands)
        records = [record for entry in entries if (record := self._decoded(*entry)) is not None]
        if with_state and not records:
            status, count = state[0]
            if status is None:
                raise NotFound("no such request, or its resume window is over")
            if status == b"ended" and int(count) < after:
                raise StreamDivergence("the journal ends before what was sent already")
        return records, len(entries) == PAGE and bool(records)

    def _decoded(self, entry_id: bytes, fields: dict[bytes, bytes]) -> Record | None:
        try:
            return decode_entry(entry_id, fields)
        except Malformed as error:
            self._dropped(str(error))
            return None


def _position(record: Record) -> int:
    """Tokens of the answer with this record."""
    return record.count if isinstance(record, End) else record.end
