"""Keeps the special tokens that users write out of a prompt: their text stays text.

A user's text is data. If it spells one of the model's special tokens, `Disguise` exchanges
characters before the chat template is rendered, and restores them afterwards, so that only special
tokens of the template itself are found in its output.
"""

from __future__ import annotations

import os.path
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, groupby
from typing import Any

from model.text.chat_template import ChatTemplateError

Json = Any  # strings, numbers, lists and mappings of them

# Private use in the basic plane, planes 4 to 13 (unassigned), 15 and 16 (private use).
_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0x10FFFE), range(0x40000, 0xE0000))
_MAX_NESTING = 8  # groups in a pattern: the compiler recurses


class SpecialTexts:
    """The texts of a model's special tokens, compiled for searching. Immutable."""

    def __init__(self, texts: Collection[str]) -> None:
        self._sorted = sorted(filter(None, texts))
        self._longest = max(map(len, self._sorted), default=0)
        self.firsts = {text[0] for text in self._sorted}
        self.characters = set().union(*self._sorted)
        self._beginnings = _beginnings(self._sorted) if self._sorted else None
        self.pattern = re.compile(f"({any_of(self._sorted)})") if self._sorted else None
        """Matches the longest text at a position, in a group of its own."""

    def replace_beginnings(self, text: str, stand_ins: Mapping[str, str]) -> str:
        """Replaces the first character of each special text, overlapping ones included.

        Also if only the beginning of one is at the end of `text`.
        """
        if self._beginnings is None:
            return text
        tail = max(0, len(text) - self._longest + 1)
        starts = [at for at in range(tail, len(text)) if text[at] in self.firsts]
        for at in [at for at in starts if self._any_begins_with(text[at:])]:
            text = f"{text[:at]}{stand_ins[text[at]]}{text[at + 1 :]}"
        return self._beginnings.sub(lambda match: stand_ins[match[0]], text)

    def _any_begins_with(self, text: str) -> bool:
        place = bisect_left(self._sorted, text)
        return place < len(self._sorted) and self._sorted[place].startswith(text)


class Disguise:
    """Keeps special tokens out of users' text, through any template, without changing it.

    The first character of every special token's text that a user wrote is exchanged for a private
    stand-in, also if only the beginning of one is at the end of a string, because the next string
    might complete it. `remove` undoes it in the template's output. A stand-in is a code point that
    occurs in none of the strings, so no user's text can be mistaken for one.
    """

    def __init__(self, specials: SpecialTexts, strings: Iterable[str]) -> None:
        self._specials = specials
        used = specials.characters.union(*strings)
        unused = (chr(code) for code in chain(*_PRIVATE) if chr(code) not in used)
        try:
            self.end = next(unused)  # marks the end of a message
            self._stand_ins = {first: next(unused) for first in specials.firsts}
        except StopIteration:
            raise ChatTemplateError("the messages use every private code point") from None
        self._originals = {ord(self.end): None} | {
            ord(stand_in): first for first, stand_in in self._stand_ins.items()
        }

    def put_on(self, value: Json) -> Json:
        """A copy of a JSON-like value with every string disguised."""
        if isinstance(value, str):
            return self._specials.replace_beginnings(value, self._stand_ins)
        if isinstance(value, Mapping):
            return {self.put_on(key): self.put_on(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.put_on(item) for item in value]
        return value

    def remove(self, text: str) -> str:
        """The text as the user wrote it."""
        return text.translate(self._originals)


def any_of(texts: Collection[str], *, nesting: int = _MAX_NESTING) -> str:
    """A pattern that matches the longest of the texts at a position.

    Texts with a common prefix share it in the pattern (`a(?:bc|d)`), so that a near match is tried
    once and not once per text.
    """
    longest_first = sorted(texts, reverse=True)
    if nesting == 0:
        return "|".join(map(re.escape, longest_first))
    branches = []
    for _, group in groupby(longest_first, lambda text: text[:1]):
        members = list(group)
        prefix = os.path.commonprefix(members)  # noqa: RUF071  (strings, not paths)
        branch = re.escape(prefix)
        if len(members) > 1:
            rests = [text[len(prefix) :] for text in members]
            branch += f"(?:{any_of(rests, nesting=nesting - 1)})"
        branches.append(branch)
    return "|".join(branches)


def _beginnings(texts: Collection[str]) -> re.Pattern[str]:
    """Matches one character at each position at which a text begins."""
    rests: dict[str, list[str]] = {}
    for text in texts:
        rests.setdefault(text[0], []).append(text[1:])
    return re.compile(
        "|".join(f"{re.escape(first)}(?={any_of(rest)})" for first, rest in rests.items())
    )


def strings_of(value: object) -> Iterable[str]:
    """Every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings_of(list(value))
        yield from strings_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)
