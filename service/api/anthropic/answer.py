"""A message as an object, as the events of a stream, and an error: what Anthropic's clients read.

The content of a message is blocks: the reasoning, text and tool-call segments of the answer. In a
stream:

    message_start · ( content_block_start · content_block_delta* · content_block_stop )* ·
    message_delta · message_stop

The last delta of a thinking block is its signature. A `ping` follows the start of the first block,
as in Anthropic's own streams. It also carries the event id of a token without visible text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import orjson

from service.api.generation.deltas import (
    Accumulator,
    DeltaTracker,
    Finish,
    ReasoningSegment,
    Segment,
    SegmentDelta,
    Start,
    StreamDelta,
    ToolCallSegment,
)
from service.api.generation.reader import AnswerReader
from service.errors import BadRequest, QuireError, ShuttingDown

PREFIX = "msg_"

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_UNUSED: Mapping[str, Any] = {
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    "inference_geo": None,
    "service_tier": "standard",
}
"""The fields of a message's usage that are always the same here."""
_ERROR_TYPES: Mapping[int, str] = MappingProxyType({
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
})  # fmt: skip


def message_object(reader: AnswerReader, answer: Accumulator) -> dict[str, Any]:
    """The message so far."""
    return {
        "id": PREFIX + reader.id,
        "type": "message",
        "role": "assistant",
        "model": reader.manifest.model,
        "content": [_block(segment) for segment in answer.segments],
        **stop_fields(reader, answer),
        "usage": {**_UNUSED, **message_usage(reader)},
    }


def opened_block(segment: Segment) -> dict[str, Any]:
    """A block before it has content."""
    if isinstance(segment, ReasoningSegment):
        return {"type": "thinking", "thinking": "", "signature": ""}
    if isinstance(segment, ToolCallSegment):
        caller = {"type": "direct"}
        return {
            "type": "tool_use", "id": segment.id, "name": segment.name, "input": {},
            "caller": caller,
        }  # fmt: skip
    return {"type": "text", "text": "", "citations": []}


def block_delta(segment: Segment, text: str) -> dict[str, Any]:
    """The growth of a block. The JSON of a tool call's input is streamed as text."""
    if isinstance(segment, ReasoningSegment):
        return {"type": "thinking_delta", "thinking": text}
    if isinstance(segment, ToolCallSegment):
        return {"type": "input_json_delta", "partial_json": text}
    return {"type": "text_delta", "text": text}


def last_delta(segment: Segment) -> dict[str, Any] | None:
    """The delta that completes a block; None if it is complete."""
    if not isinstance(segment, ReasoningSegment):
        return None
    return {"type": "signature_delta", "signature": _signature(segment)}


def _block(segment: Segment) -> dict[str, Any]:
    """A block with its content. Input that was cut off by the end of the answer is left empty."""
    block = opened_block(segment)
    if isinstance(segment, ReasoningSegment):
        return block | {"thinking": segment.text, "signature": _signature(segment)}
    if not isinstance(segment, ToolCallSegment):
        return block | {"text": segment.text}
    try:
        return block | {"input": json.loads(segment.text)}
    except ValueError:
        return block


def _signature(segment: ReasoningSegment) -> str:
    """Clients require one. It depends on the text alone, so a resumed stream has the same."""
    return base64.b64encode(hashlib.sha256(segment.text.encode()).digest()).decode()


def stop_fields(reader: AnswerReader, answer: Accumulator) -> dict[str, Any]:
    """Why the answer ended. A reason that Anthropic has no word for keeps its own name."""
    end, reason, sequence = answer.end, answer.finish_reason, None
    if end is not None and isinstance(end.stopped_by, str):
        reason, sequence = "stop_sequence", end.stopped_by
    elif reason == "length" and reader.usage.total_tokens >= reader.context.card.max_model_len:
        reason = "model_context_window_exceeded"
    return {
        "stop_reason": None if reason is None else _REASONS.get(reason, reason),
        "stop_sequence": sequence,
        "stop_details": None,
        "container": None,
    }


def message_usage(reader: AnswerReader) -> dict[str, Any]:
    """Token counts so far. Input tokens are those that were not in the prefix cache."""
    usage = reader.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "server_tool_use": None,
    }


def message_error_body(error: QuireError) -> bytes:
    """`{"type": "error", "error": {type, message}}` in ASCII. The form has no place for the name of
    a field, so the message begins with it.
    """
    kind = "invalid_request_error" if isinstance(error, BadRequest) else "api_error"
    message = error.message
    if error.param is not None and not message.startswith(error.param):
        message = f"{error.param}: {message}"
    fields = {"type": _ERROR_TYPES.get(error.status, kind), "message": message}
    if isinstance(error, ShuttingDown):
        fields |= {"code": error.code, **error.details()}
    return json.dumps({"type": "error", "error": fields}).encode()


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
        self._resumed = True
        if not isinstance(delta, Start):
            self._changes(delta)

    def begin(self) -> bytes:
        """The message without content, with the token count of its prompt."""
        if self._resumed:
            return b""
        return _event("message_start", message=message_object(self._reader, self._answer))

    def event(self, _choice: int, delta: StreamDelta) -> bytes:
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
