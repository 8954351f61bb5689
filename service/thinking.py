"""Thinking: the part of an output before its content, and what separates the two.

    opening | thinking | closing [joint] [head] | content

`Splitter` reads an output in chunks and returns the thinking and the content that each makes
certain. The sum of what it returned depends on the text alone, not on the chunks. The API reads
text with it and the engine tokens (`TokenScan`), so both agree on where the content begins.

The tags are fixed strings. A part of a tag that is a special token of the model has no text: it is
a *symbol*, a character that no text contains, so that a text cannot spell it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingFormat:
    """How a model delimits its thinking."""

    signs: tuple[str, ...]  # a chat template that contains all of these has this format
    opening: str
    closing: str
    parts: tuple[str, ...]  # parts of the tags that may be special tokens
    joint: str = ""  # after the closing, before the next opening, a head or the content
    heads: tuple[str, ...] = ()  # before content, and no part of it
    end: str | None = None  # after content, if more may follow: a joint, then as after a closing

    def spelled(self, symbols: Mapping[str, str]) -> Self:
        """The format with the symbols of its special tokens."""

        def spell(tag: str) -> str:
            for part, symbol in symbols.items():
                tag = tag.replace(part, symbol)
            return tag

        return replace(
            self,
            opening=spell(self.opening),
            closing=spell(self.closing),
            joint=spell(self.joint),
            heads=tuple(map(spell, self.heads)),
            end=None if self.end is None else spell(self.end),
        )


THINKING_FORMATS: Mapping[str, ThinkingFormat] = MappingProxyType({
    "gpt-oss": ThinkingFormat(
        signs=("<|channel|>", "<|message|>", "analysis"),
        opening="<|channel|>analysis<|message|>",
        closing="<|end|>",
        joint="<|start|>assistant",
        heads=("<|channel|>final<|message|>", "<|channel|>commentary<|message|>"),
        end="<|end|>",
        parts=("<|channel|>", "<|message|>", "<|end|>", "<|start|>"),
    ),
    "mistral": ThinkingFormat(  # Magistral, Ministral 3
        signs=("[THINK]", "[/THINK]"),
        opening="[THINK]",
        closing="[/THINK]",
        parts=("[THINK]", "[/THINK]"),
    ),
    "think": ThinkingFormat(  # Qwen 3, SmolLM 3, DeepSeek R1 and most others
        signs=("</think>",),
        opening="<think>",
        closing="</think>",
        parts=("<think>", "</think>"),
    ),
})  # fmt: skip
"""Name -> format."""


BLANKS = " \t\r\n"


class Phase(Enum):
    """Position in an output.

    START --opening--> THINKING --closing--> BETWEEN --> START
    START --head, or anything else--> CONTENT --end--> BETWEEN
    """

    START = "start"
    THINKING = "thinking"
    BETWEEN = "between"
    CONTENT = "content"


def symbol(index: int) -> str:
    """The character of the special token of this number: a lone surrogate, which is no text."""
    return chr(0xD800 + index)


class Splitter:
    """Splits thinking and content. `tags` are spelled with symbols (see `ThinkingFormat.spelled`).

    Blanks around thinking belong to neither, unless the content is `verbatim`: then it begins right
    after the tags. Thinking after the first content is dropped.
    """

    __slots__ = ("_blank", "_held", "_tags", "_verbatim", "has_content", "has_thought", "phase")

    def __init__(self, tags: ThinkingFormat, *, opened: bool, verbatim: bool) -> None:
        """`opened`: the prompt has the opening."""
        self.phase = Phase.THINKING if opened else Phase.START
        self.has_thought = opened
        self.has_content = False
        self._tags = tags
        self._verbatim = verbatim
        self._held = ""  # read, not decided
        self._blank = True  # whether the thinking or the content has only had blanks so far

    @property
    def held(self) -> str:
        """What was read and is not decided."""
        return self._held

    def copy(self) -> Self:
        """An independent splitter in the same state."""
        return copy(self)

    def push(self, text: str) -> tuple[str, str]:
        """Reads a chunk; returns the (thinking, content) that became certain."""
        self._held += text
        thinking, content = "", ""
        while True:
            phase, certain = self.phase, self._step()
            if phase is Phase.THINKING and not self.has_content:
                thinking += certain
            elif phase is Phase.CONTENT:
                self.has_content |= bool(certain)
                content += certain
            if self.phase is phase:
                return thinking, content

    def finish(self) -> tuple[str, str]:
        """Returns what was held back; the output has ended."""
        held, self._held = self._held, ""
        if self.phase is Phase.THINKING:
            return ("" if self.has_content else held), ""
        in_tag = self.phase is Phase.BETWEEN or (self.phase is Phase.START and self._tags.heads)
        return "", ("" if in_tag else held)

    def _step(self) -> str:
        """Reads as far as the phase goes; returns what is certain of it."""
        match self.phase:
            case Phase.START:
                self._read_start()
                return ""
            case Phase.THINKING:
                return self._read_thinking()
            case Phase.BETWEEN:
                self._read_between()
                return ""
            case Phase.CONTENT:
                return self._read_content()

    def _read_start(self) -> None:
        tags = self._tags
        blanks_count = self._verbatim or self.has_thought
        held = self._held if blanks_count else self._held.lstrip(BLANKS)
        openings = () if self.has_thought and not tags.joint else (tags.opening,)
        for tag in (*openings, *tags.heads):
            if held.startswith(tag):
                self._enter(Phase.THINKING if tag == tags.opening else Phase.CONTENT)
                self._held = held[len(tag) :]
                return
        if not any(tag.startswith(held) for tag in (*openings, *tags.heads)):
            self._enter(Phase.CONTENT)

    def _read_thinking(self) -> str:
        if self._blank:
            self._held = self._held.lstrip(BLANKS)
        closing, held = self._tags.closing, self._held
        at = held.find(closing)
        if at >= 0:
            self._held = held[at + len(closing) :]
            self._enter(Phase.BETWEEN)
            return held[:at].rstrip(BLANKS)
        certain = held[: len(held) - len(prefix_at_end(held, closing))].rstrip(BLANKS)
        self._held = held[len(certain) :]
        self._blank &= not certain
        return certain

    def _read_between(self) -> None:
        joint, held = self._tags.joint, self._held
        if joint and joint.startswith(held) and held != joint:
            return
        self._held = held.removeprefix(joint)
        self._enter(Phase.START)

    def _read_content(self) -> str:
        if self._blank and self.has_thought and not self._verbatim:
            self._held = self._held.lstrip(BLANKS)
        end, held = self._tags.end, self._held
        at = -1 if end is None else held.find(end)
        if end is not None and at >= 0:
            self._held = held[at + len(end) :]
            self._enter(Phase.BETWEEN)
            return held[:at]
        size = 0 if end is None else len(prefix_at_end(held, end))
        certain = held[: len(held) - size]
        self._held = held[len(certain) :]
        self._blank &= not certain
        return certain

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.has_thought |= phase is Phase.THINKING
        self._blank = True


def prefix_at_end(text: str, tag: str) -> str:
    """The longest end of a text that is the beginning of a tag, but not all of it."""
    size = min(len(text), len(tag) - 1)
    while size and not text.endswith(tag[:size]):
        size -= 1
    return tag[:size]


def token_text(token: int, *, token_bytes: Sequence[bytes], symbols: Mapping[int, str]) -> str:
    """A token as a splitter reads it: its symbol, or a character per byte. The tags are ASCII."""
    return symbols.get(token) or token_bytes[token].decode("latin-1")


class TokenScan:
    """A splitter that reads token ids. `num_thinking` counts tokens of the thinking, tags aside."""

    __slots__ = ("_symbols", "_token_bytes", "num_thinking", "splitter")

    def __init__(
        self, splitter: Splitter, *, token_bytes: Sequence[bytes], symbols: Mapping[int, str]
    ) -> None:
        """`symbols`: token id -> symbol."""
        self.splitter = splitter
        self.num_thinking = 0
        self._token_bytes = token_bytes
        self._symbols = symbols

    @property
    def phase(self) -> Phase:
        """The phase after the last token."""
        return self.splitter.phase

    def copy(self) -> Self:
        """An independent scan in the same state."""
        scan = copy(self)
        scan.splitter = self.splitter.copy()
        return scan

    def read(self, token: int) -> None:
        """Reads a token."""
        before = self.phase
        text = token_text(token, token_bytes=self._token_bytes, symbols=self._symbols)
        self.splitter.push(text)
        if before is self.phase is Phase.THINKING:
            self.num_thinking += 1
