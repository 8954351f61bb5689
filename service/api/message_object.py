"""A message as an object: what Anthropic's clients read of an answer.

Its content is blocks: runs of text, and tool calls. `Blocks` sums them up from what is shown, and
says how each piece changes them, so that a stream's events and a whole body cannot differ.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from service.api.answer import Answer
from service.api.pieces import Ending, Piece
from service.api.tool_calls import CallDelta
from service.api.usage import usage

PREFIX = "msg_"

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass(slots=True)
class TextRun:
    """A block of text."""

    text: str = ""

    def opened(self) -> dict[str, Any]:
        """As it is announced, empty."""
        return {"type": "text", "text": ""}

    def whole(self) -> dict[str, Any]:
        """As it is in the end."""
        return {"type": "text", "text": self.text}


@dataclass(slots=True)
class ToolRun:
    """A block that asks for a tool. The text of its input comes bit by bit."""

    id: str
    name: str
    text: str = ""

    def opened(self) -> dict[str, Any]:
        """As it is announced, without its input."""
        return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}

    def whole(self) -> dict[str, Any]:
        """As it is in the end. An input that the answer's end cut off cannot be told."""
        try:
            given = json.loads(self.text)
        except ValueError:
            given = {}
        return self.opened() | {"input": given}


@dataclass(frozen=True, slots=True)
class Change:
    """What a piece does to one block: it may open it, and adds to it."""

    index: int
    block: TextRun | ToolRun
    opens: bool
    delta: dict[str, Any] | None


class Blocks:
    """The content so far; the last block is the open one."""

    def __init__(self) -> None:
        self._blocks: list[TextRun | ToolRun] = []

    @property
    def last(self) -> int | None:
        """The index of the open block."""
        return len(self._blocks) - 1 if self._blocks else None

    def add(self, shown: Piece | Ending) -> list[Change]:
        """The changes that a piece makes, in order: the open call goes on before text follows."""
        calls = shown.calls if isinstance(shown, Piece) else ()
        changes = [self._go_on(call) for call in calls if call.id is None]
        if shown.text:
            changes.append(self._add_text(shown.text))
        return changes + [self._open_call(call) for call in calls if call.id is not None]

    def whole(self) -> list[dict[str, Any]]:
        """All blocks."""
        return [block.whole() for block in self._blocks]

    def _add_text(self, text: str) -> Change:
        opens = not self._blocks or not isinstance(self._blocks[-1], TextRun)
        if opens:
            self._blocks.append(TextRun())
        return self._grow(text, {"type": "text_delta", "text": text}, opens=opens)

    def _open_call(self, call: CallDelta) -> Change:
        assert call.id is not None  # noqa: S101  # the caller's case
        self._blocks.append(ToolRun(call.id, call.name or ""))
        return self._grow(call.arguments, _json_delta(call), opens=True)

    def _go_on(self, call: CallDelta) -> Change:
        return self._grow(call.arguments, _json_delta(call), opens=False)

    def _grow(self, text: str, delta: dict[str, Any], *, opens: bool) -> Change:
        block = self._blocks[-1]
        block.text += text
        return Change(len(self._blocks) - 1, block, opens, delta if text else None)


def _json_delta(call: CallDelta) -> dict[str, Any]:
    return {"type": "input_json_delta", "partial_json": call.arguments}


def message_object(answer: Answer, blocks: Blocks, ending: Ending | None) -> dict[str, Any]:
    """The message as it stands: without an `ending` as it begins."""
    return {
        "id": PREFIX + answer.id,
        "type": "message",
        "role": "assistant",
        "model": answer.manifest.model,
        "content": blocks.whole(),
        **stop_fields(ending),
        "usage": message_usage(answer),
    }


def stop_fields(ending: Ending | None) -> dict[str, Any]:
    """Why it ended. Where Anthropic has no word for a reason it is our own."""
    if ending is None:
        return {"stop_reason": None, "stop_sequence": None}
    if isinstance(ending.end.stopped_by, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": ending.end.stopped_by}
    reason = ending.finish_reason
    return {"stop_reason": _REASONS.get(reason, reason), "stop_sequence": None}


def message_usage(answer: Answer) -> dict[str, Any]:
    """Counts so far. Input tokens are those that were not found in the prefix cache."""
    counts = usage(answer.manifest, answer.readers)
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counts["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": counts["completion_tokens"],
    }
