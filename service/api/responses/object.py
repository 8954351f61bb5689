"""A response as an object, at any time: a pure function of its manifest and its journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from service.api.generation.deltas import (
    Accumulator,
    ReasoningSegment,
    ScoredToken,
    TextSegment,
    ToolCallSegment,
)
from service.api.generation.logprobs import chat_logprobs
from service.api.generation.manifest import Manifest
from service.api.generation.reader import AnswerReader, failure_of
from service.api.responses.items import seal
from service.messages import FinishReason

PREFIX = "resp_"


class Status(StrEnum):
    """The status of a response. Those after `in_progress` are final."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    CANCELLED = "cancelled"


_ENDS = {
    FinishReason.STOP: Status.COMPLETED,
    FinishReason.LENGTH: Status.INCOMPLETE,
    FinishReason.DEADLINE: Status.INCOMPLETE,
    FinishReason.CANCELLED: Status.CANCELLED,
    FinishReason.ERROR: Status.FAILED,
}
_INCOMPLETE = {FinishReason.LENGTH: "max_output_tokens", FinishReason.DEADLINE: "deadline"}


def status_of(answer: Accumulator) -> Status:
    """The status after the journal so far. Before the first token, a running response is queued."""
    if answer.end is None:
        return Status.IN_PROGRESS if answer.ids else Status.QUEUED
    return Status.FAILED if failure_of(answer.end) else _ENDS[answer.end.reason]


def item_status(status: Status) -> Status:
    """The status of the last item of a response. Items have fewer of them."""
    if status in {Status.COMPLETED, Status.IN_PROGRESS}:
        return status
    return Status.INCOMPLETE


def is_plain(manifest: Manifest) -> bool:
    """Whether the output is one message."""
    return manifest.notation is None and manifest.reasoning is None


def has_summary(manifest: Manifest) -> bool:
    """Whether the reasoning is also returned as its summary."""
    asked: dict[str, Any] = manifest.given_back.get("reasoning") or {}
    return asked.get("summary") is not None


def response_object(reader: AnswerReader, answer: Accumulator, *, status: Status) -> dict[str, Any]:
    """The body of all endpoints that return a response, and of the events that carry it."""
    manifest, end = reader.manifest, answer.end
    failure = None if end is None else failure_of(end)
    error = None if failure is None else {"code": failure.code, "message": failure.message}
    reason = _INCOMPLETE.get(end.reason) if end and status is Status.INCOMPLETE else None
    return manifest.given_back | {
        "id": PREFIX + reader.id,
        "object": "response",
        "created_at": manifest.created,
        "model": manifest.model,
        "system_fingerprint": reader.fingerprint(),
        "status": status,
        "completed_at": _completed_at(reader, answer) if status is Status.COMPLETED else None,
        "error": error,
        "incomplete_details": None if reason is None else {"reason": reason},
        "output": output_items(reader, answer, status),
        "usage": None if end is None else _usage(reader),
    }


def _completed_at(reader: AnswerReader, answer: Accumulator) -> int:
    """In Unix seconds; the clocks of engine and API may differ."""
    ended_at = None if answer.end is None else answer.end.ended_at
    return max(reader.manifest.created, ended_at or 0)


def output_items(reader: AnswerReader, answer: Accumulator, status: Status) -> list[dict[str, Any]]:
    """The items of the output so far."""
    if is_plain(reader.manifest):  # one message, even if it has no text
        if not answer.ids and status not in {Status.COMPLETED, Status.INCOMPLETE}:
            return []
        answer = replace(answer, segments=answer.segments or [TextSegment()])
    last = len(answer.segments) - 1
    return [
        item_object(
            reader, answer, i, status=item_status(status) if i == last else Status.COMPLETED
        )
        for i in range(last + 1)
    ]


def item_id(reader: AnswerReader, answer: Accumulator, index: int) -> str:
    """The id of an item of the output."""
    segment = answer.segments[index]
    if isinstance(segment, ToolCallSegment):
        return f"{'ctc' if segment.custom else 'fc'}_{reader.id}_{index}"
    prefix = "rs" if isinstance(segment, ReasoningSegment) else "msg"
    return f"{prefix}_{reader.id}_{index}" if index else f"{prefix}_{reader.id}"


def opened_item(reader: AnswerReader, answer: Accumulator, index: int) -> dict[str, Any]:
    """An item before it has content."""
    segment, status = answer.segments[index], Status.IN_PROGRESS
    id_ = item_id(reader, answer, index)
    if isinstance(segment, ToolCallSegment):
        kind, content = call_names(segment)
        fields = {"call_id": segment.id, "name": segment.name, content: ""}
        return {"id": id_, "type": kind, "status": status, **fields}
    if isinstance(segment, ReasoningSegment):
        return {"id": id_, "type": "reasoning", "status": status, "summary": [], "content": []}
    # Clients have always received the keys in another order with tools.
    role = {} if is_plain(reader.manifest) else {"role": "assistant"}
    head = {"id": id_, "type": "message", **role}
    return head | {"status": status, "role": "assistant", "content": []}


def call_names(segment: ToolCallSegment) -> tuple[str, str]:
    """The type of a call's item, and the name of its content."""
    return ("custom_tool_call", "input") if segment.custom else ("function_call", "arguments")


def item_object(
    reader: AnswerReader, answer: Accumulator, index: int, *, status: Status
) -> dict[str, Any]:
    """An item with its content so far."""
    item, segment = opened_item(reader, answer, index) | {"status": status}, answer.segments[index]
    if isinstance(segment, ToolCallSegment):
        return item | {call_names(segment)[1]: segment.text}
    if isinstance(segment, ReasoningSegment):
        if has_summary(reader.manifest):
            item["summary"] = [summary_part(segment.text)]
        if reader.manifest.sealed_reasoning:
            item["encrypted_content"] = seal(segment.text)
        return item | {"content": [reasoning_part(segment.text)]}
    # Without tools, all tokens are the message's; with tools, none is scored.
    return item | {"content": [text_part(segment.text, logprobs(reader, answer.scored))]}


def reasoning_part(text: str) -> dict[str, Any]:
    """The only content part of a reasoning item."""
    return {"type": "reasoning_text", "text": text}


def summary_part(text: str) -> dict[str, Any]:
    """The only part of a summary: it has all of the reasoning."""
    return {"type": "summary_text", "text": text}


def text_part(text: str, scored: Sequence[Any] = ()) -> dict[str, Any]:
    """The only content part of a message, with its log probabilities if they were requested."""
    return {"type": "output_text", "annotations": [], "text": text, "logprobs": scored}


def logprobs(reader: AnswerReader, scored: Sequence[ScoredToken]) -> list[Any]:
    """An object per token; empty if log probabilities were not requested."""
    content: list[Any] = chat_logprobs(scored, reader.context.tokenizer)["content"]
    return content


def _usage(reader: AnswerReader) -> dict[str, Any]:
    usage = reader.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
