"""The events of a streamed message.

    message_start · ( content_block_start · content_block_delta* · content_block_stop )* ·
    message_delta · message_stop

The last delta of a thinking block is its signature. A `ping` follows the start of the first block,
as in Anthropic's own streams. It also carries the event id of a token without visible text.
"""

from __future__ import annotations

from typing import Any

import orjson

from service.api.anthropic.object import (
    block_delta,
    last_delta,
    message_error_body,
    message_object,
    message_usage,
    opened_block,
    stop_fields,
)
from service.api.generation.accumulate import Accumulator, DeltaTracker, SegmentDelta
from service.api.generation.deltas import Finish, Start, StreamDelta
from service.api.generation.reader import AnswerReader
from service.errors import QuireError

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class MessageRenderer:
    """Renders the events of one message. With event ids, the last event of a token has its id."""

    keep_alive = _PING  # clients may count events, and comments are none

    def __init__(self, reader: AnswerReader, *, event_ids: bool) -> None:
        self._reader = reader
        self._event_ids = event_ids
        self._answer = Accumulator()
        self._blocks = DeltaTracker()
        self._resumed = False

    def skip(self, delta: StreamDelta) -> None:
        """Takes note of a delta that the client has received."""
        self._resumed = True
        if not isinstance(delta, Start):
            self._changes(delta)

    def begin(self) -> bytes:
        """The message without content, with the token count of its prompt."""
        if self._resumed:
            return b""
        return _event("message_start", message=message_object(self._reader, self._answer))

    def event(self, _choice: int, delta: StreamDelta) -> bytes:
        """The events of one delta."""
        if isinstance(delta, Start):
            return b""
        events = self._changes(delta)
        if isinstance(delta, Finish):
            return b"".join(events) + self._end()
        if not self._event_ids:
            return b"".join(events)
        *others, last = events or [_PING]
        return b"%sid: %s\n%s" % (b"".join(others), self._reader.position.encode(), last)

    def finish(self) -> bytes:
        """The last event."""
        return _event("message_stop")

    def fail(self, error: QuireError) -> bytes:
        """The error, in the form of an error body."""
        return b"event: error\ndata: " + message_error_body(error) + b"\n\n"

    def _changes(self, delta: StreamDelta) -> list[bytes]:
        self._answer.add(delta)
        events: list[bytes] = []
        for change in self._blocks.changes(self._answer.segments):
            if change.opens:
                events += self._opened(change)
            if change.text:
                grown = block_delta(change.segment, change.text)
                events.append(_event("content_block_delta", index=change.index, delta=grown))
        return events

    def _opened(self, change: SegmentDelta) -> list[bytes]:
        index, block = change.index, opened_block(change.segment)
        start = _event("content_block_start", index=index, content_block=block)
        return [start, _PING] if index == 0 else [*self._closed(index - 1), start]

    def _closed(self, index: int) -> list[bytes]:
        delta = last_delta(self._answer.segments[index])
        stop = _event("content_block_stop", index=index)
        if delta is None:
            return [stop]
        return [_event("content_block_delta", index=index, delta=delta), stop]

    def _end(self) -> bytes:
        open_block = self._blocks.open
        stop = [] if open_block is None else self._closed(open_block)
        delta, usage = stop_fields(self._reader, self._answer), message_usage(self._reader)
        return b"".join([*stop, _event("message_delta", delta=delta, usage=usage)])


def _event(kind: str, **fields: Any) -> bytes:  # noqa: ANN401  # any JSON
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))
