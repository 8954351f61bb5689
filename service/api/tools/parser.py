"""Tool calls out of a model's text: what is said to the reader, and what is asked of functions.

`ToolCallParser` reads the text of one choice in pieces and tells what became certain with each. What it
has told in all is a function of the text alone, however it was cut: so a stream, its sum, and a
stream that goes on elsewhere say the same. What may be the beginning of a call is held back, and
the blanks before it, which belong to the call:

    text | told ............ | held: blanks, and what may begin the opening |
    call | told by its name, once that is complete, then by its arguments as they come |

The grammar of the request sees to it that a call that has begun is well-formed. Where a text is not
(nothing that this server makes), what does not fit is told as text. A call that the answer's end
cut off before its name was complete is not told at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from service.api.tools.formats import ToolFormat

MAX_NAME = 64  # characters of a function's name


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is new of one call; `id` and `name` come once, first."""

    index: int  # of the call in its choice
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ParsedText:
    """What became certain: text, and news of calls, at most one for each."""

    text: str
    calls: tuple[CallDelta, ...] = ()


def call_id(notation: ToolFormat, request_id: str, index: int) -> str:
    """A call's id: the same whenever and wherever the answer is read."""
    digest = hashlib.sha256(f"{request_id}/{index}".encode()).hexdigest()
    return notation.id_prefix + digest[: notation.id_length]


class ToolCallParser:
    """The text of one choice, up to where it was read."""

    def __init__(self, notation: ToolFormat, *, request_id: str) -> None:
        self._notation = notation
        self._request_id = request_id
        self._step: Callable[[], bool] = self._read_text
        self._held = ""  # read, but not decided
        self._begun = ""  # of a call whose name is not certain yet: all since its opening
        self._name = ""
        self._id = ""  # as the model wrote it, if it did
        self._ids: set[str] = set()  # of the calls so far
        self._arguments = _ObjectScan()
        self._text: list[str] = []
        self._calls: dict[int, CallDelta] = {}
        self._at_start = True
        self._num_calls = 0
        self._in_arguments = False

    @property
    def called(self) -> bool:
        """Whether there is a call, and all that have begun are whole."""
        return self._num_calls > 0 and not self._in_arguments

    def push(self, text: str) -> ParsedText:
        """Reads on; tells what became certain."""
        self._held += text
        while self._step():
            pass
        return self._told()

    def finish(self) -> ParsedText:
        """Tells the text that was held back: the answer is at its end."""
        if self._step == self._read_text:
            self._text.append(self._held)
        self._held = ""
        return self._told()

    def _told(self) -> ParsedText:
        told = ParsedText("".join(self._text), tuple(self._calls.values()))
        self._text, self._calls = [], {}
        return told

    # --- what is being read; each returns whether something else comes next ------------------

    def _read_text(self) -> bool:
        opening, held = self._notation.opening, self._held
        if self._notation.only_first:
            at = 0 if self._at_start and held.startswith(opening) else -1
            kept = len(held) if self._at_start and opening.startswith(held) else 0
        else:
            at = held.find(opening)
            kept = _may_begin(held, opening)
        if at >= 0:
            text = held[:at].rstrip()
            self._tell(text)
            self._at_start = False
            self._begun = held[len(text) : at + len(opening)]
            self._held = held[at + len(opening) :]
            self._step = self._read_head
            return True
        self._tell(held[: len(held) - kept])
        self._held = held[len(held) - kept :]
        return False

    def _read_head(self) -> bool:
        return self._read_one_of(self._notation.heads, self._read_name)

    def _read_name(self) -> bool:
        end = self._held.find(self._notation.between[0])
        if end < 0:
            return self._is_text() if len(self._held) > MAX_NAME else False
        self._name, self._id = self._held[:end], ""
        self._begun += self._name
        self._held = self._held[end:]
        self._step = self._read_between if self._notation.id_mark is None else self._read_id
        return True

    def _read_id(self) -> bool:
        mark, held = self._notation.id_mark or "", self._held
        if not held.startswith(mark):
            if mark.startswith(held):
                return False
            self._step = self._read_between
            return True
        end = held.find(self._notation.between[0], len(mark))
        if end < 0:
            return self._is_text() if len(held) > len(mark) + MAX_NAME else False
        self._id = held[len(mark) : end]
        self._begun += held[:end]
        self._held = held[end:]
        self._step = self._read_between
        return True

    def _read_between(self) -> bool:
        return self._read_one_of((self._notation.between + "{",), self._read_arguments, self._open)

    def _open(self) -> None:
        index = self._num_calls
        id_ = self._next_id(index)
        self._ids.add(id_)
        self._calls[index] = CallDelta(index, "", id_, self._name)
        self._num_calls += 1
        self._begun = ""
        self._held = "{" + self._held
        self._arguments = _ObjectScan()
        self._in_arguments = True

    def _next_id(self, index: int) -> str:
        """The id that the model wrote, so that its history repeats it; else, or again, our own."""
        own = len(self._id) == self._notation.id_length and self._id.isascii()
        if own and self._id.isalnum() and self._id not in self._ids:
            return self._id
        return call_id(self._notation, self._request_id, index)

    def _read_arguments(self) -> bool:
        size = self._arguments.read(self._held)
        index = self._num_calls - 1
        before = self._calls.get(index) or CallDelta(index, "")
        if size:
            arguments = before.arguments + self._held[:size]
            self._calls[index] = CallDelta(index, arguments, before.id, before.name)
            self._held = self._held[size:]
        if not self._arguments.complete:
            return False
        self._in_arguments = False
        self._step = self._read_tail
        return True

    def _read_tail(self) -> bool:
        return self._read_one_of((self._notation.tail,), self._read_behind)

    def _read_behind(self) -> bool:
        joint, end = self._notation.joint, self._notation.end
        self._begun = ""
        if end and self._held.startswith(end):
            self._held = self._held[len(end) :]
            self._step = self._read_text
            return True
        return self._read_one_of(() if joint is None else (joint,), self._read_name)

    def _read_one_of(
        self,
        expected: tuple[str, ...],
        following: Callable[[], bool],
        then: Callable[[], None] | None = None,
    ) -> bool:
        """Reads whichever of the fixed strings comes; what is none of them is text."""
        for fixed in expected:
            if self._held.startswith(fixed):
                self._held = self._held[len(fixed) :]
                self._begun += fixed
                self._step = following
                if then is not None:
                    then()
                return True
        if any(fixed.startswith(self._held) for fixed in expected) or not self._held:
            return False
        return self._is_text()

    def _is_text(self) -> bool:
        """What looked like a call is none."""
        self._tell(self._begun)
        self._begun = ""
        self._step = self._read_text
        return True

    def _tell(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._at_start = False


def _may_begin(text: str, opening: str) -> int:
    """How many characters at the end may belong to a call: blanks, and the opening's beginning."""
    size = min(len(text), len(opening) - 1)
    while size and not opening.startswith(text[len(text) - size :]):
        size -= 1
    return len(text) - len(text[: len(text) - size].rstrip())


class _ObjectScan:
    """Finds the end of a JSON object that begins with the first character read."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.complete = False

    def read(self, text: str) -> int:
        """How many of the characters belong to the object."""
        for position, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.complete = True
                    return position + 1
        return len(text)
