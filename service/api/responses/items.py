"""The items of a response that has tools: messages and function calls, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.api.generation.accumulate import ToolCallSegment, Segment, TextSegment
from service.api.generation.reader import AnswerReader


def opened_item(answer: AnswerReader, index: int, run: Segment) -> dict[str, Any]:
    """Item `index` of the output, before it has content."""
    if isinstance(run, TextSegment):
        number = f"_{index}" if index else ""
        fields = {"id": f"msg_{answer.id}{number}", "type": "message", "role": "assistant"}
        return fields | {"status": "in_progress", "content": []}
    return {
        "id": f"fc_{answer.id}_{index}",
        "type": "function_call",
        "status": "in_progress",
        "call_id": run.id,
        "name": run.name,
        "arguments": "",
    }


def whole_item(answer: AnswerReader, index: int, run: Segment, *, status: str) -> dict[str, Any]:
    """The same with what it has so far."""
    item = opened_item(answer, index, run) | {"status": status}
    if isinstance(run, ToolCallSegment):
        return item | {"arguments": run.arguments}
    return item | {"content": [text_part(run.text)]}


def text_part(text: str) -> dict[str, Any]:
    """The one part of a message."""
    return {"type": "output_text", "annotations": [], "text": text, "logprobs": []}


def output_items(answer: AnswerReader, runs: Sequence[Segment], *, status: str) -> list[dict[str, Any]]:
    """All items; `status` is the last one's."""
    last = len(runs) - 1
    return [
        whole_item(answer, index, run, status=status if index == last else "completed")
        for index, run in enumerate(runs)
    ]
