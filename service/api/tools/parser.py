"""Parses tool calls out of a model's text.

`ToolCallParser` reads the text of one choice in chunks and returns what each chunk makes certain.
The sum of what it returned depends on the text alone, not on the chunks: so a stream, its sum, and
a stream resumed at another replica are equal. What may be the beginning of a call is held back, and
so are the blanks before it, which belong to the call:

    text | returned ........ | held back: blanks, and what may begin the opening |
    call | its name once complete, then its arguments as they arrive |

The request's grammar makes calls well-formed once they have begun. Malformed calls, which this
server never generates, are returned as text. A call that ends before its name is complete is
dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from service.api.tools.arguments import (
    ArgumentsReader,
    InputText,
    JsonObject,
    TaggedInput,
    TaggedObject,
    Types,
)
from service.api.tools.formats import ToolFormat

MAX_NAME = 128  # characters of a function's name: as at Anthropic; OpenAI allows 64


@dataclass(frozen=True, slots=True)
class CallDelta:
    """New text of one call; `id` and `name` are in its first delta only."""

    index: int  # of the call in its choice
    arguments: str  # JSON; of a custom tool: its input
    id: str | None = None
    name: str | None = None
    custom: bool = False
    complete: bool = False  # the arguments end here
    at: int = 0  # where it opens: characters of the same chunk's text before it


@dataclass(frozen=True, slots=True)
class ParsedText:
    """What became certain: text, and at most one delta per call."""

    text: str
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownTools:
    """What the parser must know of the tools that may be called."""

    custom: frozenset[str] = frozenset()  # names
    types: Mapping[str, Types] = field(default_factory=dict)  # by function, if it has tags


def call_id(tool_format: ToolFormat, request_id: str, index: int) -> str:
    """A call's id, the same whenever and wherever the answer is read."""
    digest = hashlib.sha256(f"{request_id}/{index}".encode()).hexdigest()
    return tool_format.id_prefix + digest[: tool_format.id_length]


class ToolCallParser:
    """State of the text of one choice, up to the position read."""

    def __init__(
        self, tool_format: ToolFormat, *, request_id: str, tools: KnownTools | None = None
    ) -> None:
        self._format = tool_format
        self._tools = tools or KnownTools()
        # What is no text: the opening of calls, and what comes before and after a framed text.
        fixed = (tool_format.opening, *tool_format.frames, tool_format.closing)
        self._fixed = tuple(filter(None, fixed))
        self._request_id = request_id
        self._step: Callable[[], bool] = self._read_text
        self._held = ""  # read, not decided
        self._pending = ""  # text since the opening of a call whose name is not certain yet
        self._name = ""
        self._id = ""  # if the model wrote one
        self._ids: set[str] = set()  # of the calls so far
        self._arguments: ArgumentsReader = JsonObject()
        self._text: list[str] = []
        self._calls: dict[int, CallDelta] = {}
        self._at_start = True
        self._num_calls = 0
        self._in_arguments = False

    @property
    def called(self) -> bool:
        """Whether there is a call, and all calls are complete."""
        return self._num_calls > 0 and not self._in_arguments

    def push(self, text: str) -> ParsedText:
        """Reads a chunk; returns what became certain."""
        self._held += text
        while self._step():
            pass
        return self._certain()

    def finish(self) -> ParsedText:
        """Returns the text that was held back; the answer has ended."""
        if self._step == self._read_text:
            self._text.append(self._held)
        self._held = ""
        return self._certain()

    def _certain(self) -> ParsedText:
        certain = ParsedText("".join(self._text), tuple(self._calls.values()))
        self._text, self._calls = [], {}
        return certain

    # --- the parser's states; each returns whether another state follows at once ---------------

    def _read_text(self) -> bool:
        if self._format.only_first:
            return self._read_first()
        held = self._held
        found = [(at, fixed) for fixed in self._fixed if (at := held.find(fixed)) >= 0]
        at, fixed = min(found, default=(len(held), ""))
        if fixed and not any(
            other != fixed and other.startswith(held[at:]) for other in self._fixed
        ):
            return self._read_fixed(at, fixed)
        size = max(_may_begin(held, fixed) for fixed in self._fixed)
        self._add_text(held[: len(held) - size])
        self._held = held[len(held) - size :]
        return False

    def _read_first(self) -> bool:
        """The opening counts only at the start, where a prefix may precede it."""
        opening, held = self._format.opening, self._held
        prefix = self._format.prefix
        for before in (prefix, "") if self._at_start else ():
            if held.startswith(before + opening):
                return self._read_fixed(len(before), opening, skipped=len(before))
            if (before + opening).startswith(held):
                return False
        self._add_text(held)
        self._held = ""
        return False

    def _read_fixed(self, at: int, fixed: str, *, skipped: int = 0) -> bool:
        """Reads a fixed string at a position, after `skipped` characters that are no text."""
        held = self._held
        text = held[: at - skipped]
        opens = fixed == self._format.opening
        if opens:
            text = text.rstrip()
        self._add_text(text)
        self._at_start = False
        self._held = held[at + len(fixed) :]
        if opens:
            self._pending = held[len(text) : at + len(fixed)]
            self._step = self._read_head
        return True

    def _read_head(self) -> bool:
        return self._read_one_of(self._format.heads, self._read_name)

    def _read_name(self) -> bool:
        end = self._held.find(self._format.between[0])
        if end < 0:
            return self._is_text() if len(self._held) > MAX_NAME else False
        self._name, self._id = self._held[:end], ""
        self._pending += self._name
        self._held = self._held[end:]
        self._step = self._read_between if self._format.id_mark is None else self._read_id
        return True

    def _read_id(self) -> bool:
        mark, held = self._format.id_mark or "", self._held
        if not held.startswith(mark):
            if mark.startswith(held):
                return False
            self._step = self._read_between
            return True
        end = held.find(self._format.between[0], len(mark))
        if end < 0:
            return self._is_text() if len(held) > len(mark) + MAX_NAME else False
        self._id = held[len(mark) : end]
        self._pending += held[:end]
        self._held = held[end:]
        self._step = self._read_between
        return True

    def _read_between(self) -> bool:
        fixed = self._format.between + ("" if self._format.tags else "{")
        return self._read_one_of((fixed,), self._read_arguments, self._open)

    def _open(self) -> None:
        index = self._num_calls
        id_ = self._next_id(index)
        self._ids.add(id_)
        custom = self._name in self._tools.custom
        at = sum(map(len, self._text))
        self._calls[index] = CallDelta(index, "", id_, self._name, custom, at=at)
        self._num_calls += 1
        self._pending = ""
        self._arguments = self._reader(custom=custom)
        if not self._format.tags:
            self._held = "{" + self._held
        self._in_arguments = True

    def _reader(self, *, custom: bool) -> ArgumentsReader:
        if self._format.tags:
            types = self._tools.types.get(self._name, {})
            return TaggedInput() if custom else TaggedObject(types)
        return InputText() if custom else JsonObject()

    def _next_id(self, index: int) -> str:
        """The id that the model wrote, so that its history repeats it; our own if it is missing,
        malformed or a duplicate.
        """
        own = len(self._id) == self._format.id_length and self._id.isascii()
        if own and self._id.isalnum() and self._id not in self._ids:
            return self._id
        return call_id(self._format, self._request_id, index)

    def _read_arguments(self) -> bool:
        size, new = self._arguments.read(self._held)
        self._held = self._held[size:]
        index, complete = self._num_calls - 1, self._arguments.complete
        if new or complete:
            custom = isinstance(self._arguments, InputText | TaggedInput)
            before = self._calls.get(index) or CallDelta(index, "", custom=custom)
            self._calls[index] = replace(
                before, arguments=before.arguments + new, complete=complete
            )
        if not complete:
            return False
        self._in_arguments = False
        self._step = self._read_tail
        return True

    def _read_tail(self) -> bool:
        return self._read_one_of((self._format.tail,), self._read_joint)

    def _read_joint(self) -> bool:
        joint, end = self._format.joint, self._format.end
        self._pending = ""
        if end and self._held.startswith(end):
            self._held = self._held[len(end) :]
            self._step = self._read_text
            return True
        if end.startswith(self._held):
            return False
        return self._read_one_of(() if joint is None else (joint,), self._read_name)

    def _read_one_of(
        self,
        expected: tuple[str, ...],
        following: Callable[[], bool],
        then: Callable[[], None] | None = None,
    ) -> bool:
        """Reads one of the fixed strings; anything else is text."""
        for fixed in expected:
            if self._held.startswith(fixed):
                self._held = self._held[len(fixed) :]
                self._pending += fixed
                self._step = following
                if then is not None:
                    then()
                return True
        if any(fixed.startswith(self._held) for fixed in expected) or not self._held:
            return False
        return self._is_text()

    def _is_text(self) -> bool:
        """What looked like a call is text."""
        self._add_text(self._pending)
        self._pending = ""
        self._step = self._read_text
        return True

    def _add_text(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._at_start = False


def _may_begin(text: str, opening: str) -> int:
    """The number of characters at the end that may belong to a call: blanks, and a prefix of the
    opening.
    """
    size = min(len(text), len(opening) - 1)
    while size and not opening.startswith(text[len(text) - size :]):
        size -= 1
    return len(text) - len(text[: len(text) - size].rstrip())
