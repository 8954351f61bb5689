"""A response as an object, at any time of its life: a pure function of manifest and journal."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from service.api.generation.accumulate import Accumulator
from service.api.generation.deltas import ScoredToken
from service.api.generation.reader import AnswerReader, failure_of
from service.api.openai.logprobs import chat_logprobs
from service.api.openai.usage import usage
from service.api.responses.items import output_items
from service.messages import FinishReason

PREFIX = "resp_"


class Status(StrEnum):
    """Of a response. Those after `in_progress` are final."""

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


def status_of(collected: Accumulator) -> Status:
    """What the journal says so far. Without a token nobody knows that it runs."""
    if collected.end is None:
        return Status.IN_PROGRESS if collected.ids else Status.QUEUED
    return Status.FAILED if failure_of(collected.end) else _ENDS[collected.end.reason]


def response_object(answer: AnswerReader, collected: Accumulator, *, status: Status) -> dict[str, Any]:
    """What retrieving, creating and every event of a change of status give."""
    manifest, end = answer.manifest, collected.end
    failure = None if end is None else failure_of(end)
    error = None if failure is None else {"code": failure.code, "message": failure.message}
    reason = _INCOMPLETE.get(end.reason) if end and status is Status.INCOMPLETE else None
    output = []
    if manifest.notation is not None:
        output = output_items(answer, collected.segments, status=item_status(status))
    elif collected.ids or status in {Status.COMPLETED, Status.INCOMPLETE}:
        output = [message_item(answer, collected, status=item_status(status))]
    return manifest.given_back | {
        "id": PREFIX + answer.id,
        "object": "response",
        "created_at": manifest.created,
        "model": manifest.model,
        "system_fingerprint": manifest.fingerprint,
        "status": status,
        "error": error,
        "incomplete_details": None if reason is None else {"reason": reason},
        "output": output,
        "usage": None if end is None else _usage(answer),
    }


def item_status(status: Status) -> Status:
    """Of the message in a response of that status: it knows fewer."""
    if status in {Status.COMPLETED, Status.IN_PROGRESS}:
        return status
    return Status.INCOMPLETE


def message_item(answer: AnswerReader, collected: Accumulator, *, status: Status) -> dict[str, Any]:
    """The one item of the output, where there are no tools."""
    return opened_item(answer) | {"status": status, "content": [text_part(answer, collected)]}


def opened_item(answer: AnswerReader) -> dict[str, Any]:
    """The item before it has content."""
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "status": Status.IN_PROGRESS,
        "role": "assistant",
        "content": [],
    }


def text_part(answer: AnswerReader, collected: Accumulator) -> dict[str, Any]:
    """The one part of the message."""
    return {
        "type": "output_text",
        "annotations": [],
        "text": collected.text,
        "logprobs": logprobs(answer, collected.scored),
    }


def logprobs(answer: AnswerReader, scored: Sequence[ScoredToken]) -> list[Any]:
    """An object for each token, or none at all where they were not asked for."""
    content: list[Any] = chat_logprobs(scored, answer.context.tokenizer)["content"]
    return content


def _usage(answer: AnswerReader) -> dict[str, Any]:
    counts = usage(answer.manifest, answer.readers)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"],
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }
