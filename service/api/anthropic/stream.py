"""The events of a streamed message, as Anthropic's clients put one together.

    message_start · ( content_block_start · content_block_delta* · content_block_stop )* ·
    message_delta · message_stop

A `ping` follows the first block's start, as it does there, and carries the event id of a token that
shows nothing yet. What a reader was sent before is skipped, not sent again.
"""

from __future__ import annotations

from typing import Any

import orjson

from service.api.anthropic.errors import message_error_body
from service.api.anthropic.object import (
    block_delta,
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


class MessageWriter:
    """Renders one message's events; with ids, the last event of a token has its position."""

    def __init__(self, answer: AnswerReader, *, event_ids: bool) -> None:
        self._answer = answer
        self._event_ids = event_ids
        self._collected = Accumulator()
        self._blocks = DeltaTracker()
        self._begun = False

    def begin(self) -> bytes:
        """The message, empty: its prompt is counted already."""
        if self._begun:
            return b""
        return _event("message_start", message=message_object(self._answer, self._collected))

    def skip(self, shown: StreamDelta) -> None:
        """The reader has this, and so what comes before it."""
        self._begun = True
        if not isinstance(shown, Start):
            self._changed(shown)

    def event(self, _choice: int, shown: StreamDelta) -> bytes:
        """What a record changes, in events."""
        if isinstance(shown, Start):
            return b""
        events = self._changed(shown)
        if isinstance(shown, Finish):
            return b"".join(events) + self._ended()
        if not self._event_ids:
            return b"".join(events)
        *others, last = events or [_PING]
        return b"%sid: %s\n%s" % (b"".join(others), self._answer.position.encode(), last)

    def _changed(self, shown: StreamDelta) -> list[bytes]:
        self._collected.add(shown)
        events: list[bytes] = []
        for news in self._blocks.changes(self._collected.segments):
            if news.opens:
                events += _opened(news)
            if news.text:
                delta = block_delta(news.segment, news.text)
                events.append(_event("content_block_delta", index=news.index, delta=delta))
        return events

    def finish(self) -> bytes:
        """The end of the stream."""
        return _event("message_stop")

    def fail(self, error: QuireError) -> bytes:
        """The error, as it would have been a body."""
        return b"event: error\ndata: " + message_error_body(error) + b"\n\n"

    def _ended(self) -> bytes:
        last = self._blocks.open
        stop = b"" if last is None else _event("content_block_stop", index=last)
        counts = message_usage(self._answer)
        return stop + _event("message_delta", delta=stop_fields(self._collected), usage=counts)


def _opened(news: SegmentDelta) -> list[bytes]:
    index = news.index
    start = _event("content_block_start", index=index, content_block=opened_block(news.segment))
    if index == 0:
        return [start, _PING]
    return [_event("content_block_stop", index=index - 1), start]


def _event(kind: str, **fields: Any) -> bytes:  # noqa: ANN401  # any JSON
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))
