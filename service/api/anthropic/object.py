"""A message as an object, and an error: what Anthropic's clients read.

The content of a message is blocks: the reasoning, text and tool-call segments of the answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from service.api.generation.accumulate import (
    Accumulator,
    ReasoningSegment,
    Segment,
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
        return block | {"input": json.loads(segment.arguments)}
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
