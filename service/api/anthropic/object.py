"""A message as an object: what Anthropic's clients read of an answer.

Its content is blocks: runs of text, and tool calls, as `collected` sums them up.
"""

from __future__ import annotations

import json
from typing import Any

from service.api.generation.accumulate import Accumulator, Segment, ToolCallSegment
from service.api.generation.reader import AnswerReader

PREFIX = "msg_"

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def opened_block(run: Segment) -> dict[str, Any]:
    """A block as it is announced, empty."""
    if isinstance(run, ToolCallSegment):
        return {"type": "tool_use", "id": run.id, "name": run.name, "input": {}}
    return {"type": "text", "text": ""}


def block_delta(run: Segment, text: str) -> dict[str, Any]:
    """What it grows by. The text of a tool's input comes bit by bit."""
    if isinstance(run, ToolCallSegment):
        return {"type": "input_json_delta", "partial_json": text}
    return {"type": "text_delta", "text": text}


def whole_block(run: Segment) -> dict[str, Any]:
    """A block as it is in the end. An input that the answer's end cut off cannot be told."""
    if not isinstance(run, ToolCallSegment):
        return opened_block(run) | {"text": run.text}
    try:
        return opened_block(run) | {"input": json.loads(run.arguments)}
    except ValueError:
        return opened_block(run)


def message_object(answer: AnswerReader, collected: Accumulator) -> dict[str, Any]:
    """The message as it stands."""
    return {
        "id": PREFIX + answer.id,
        "type": "message",
        "role": "assistant",
        "model": answer.manifest.model,
        "content": [whole_block(run) for run in collected.segments],
        **stop_fields(collected),
        "usage": message_usage(answer),
    }


def stop_fields(collected: Accumulator) -> dict[str, Any]:
    """Why it ended. Where Anthropic has no word for a reason it is our own."""
    end, reason = collected.end, collected.finish_reason
    if end is not None and isinstance(end.stopped_by, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stopped_by}
    word = None if reason is None else _REASONS.get(reason, reason)
    return {"stop_reason": word, "stop_sequence": None}


def message_usage(reader: AnswerReader) -> dict[str, Any]:
    """Token counts so far. Input tokens are those that were not found in the prefix cache."""
    usage = reader.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
