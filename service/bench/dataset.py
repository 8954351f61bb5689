"""Prompts of a file: JSON lines, or a JSON array, in one of three forms.

    {"prompt": "...", "max_tokens": 100}                                    max_tokens is optional
    {"messages": [{"role": "user", "content": "..."}, ...], "max_tokens": 100}
    {"conversations": [{"from": "human", "value": "..."}, ...]}             ShareGPT

Of a conversation, the first question is asked; the answer after it gives the length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from service.errors import StartupError

CHARACTERS = 4  # of a token of English text


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, and the most tokens of its answer."""

    text: str
    max_tokens: int


def read_dataset(path: Path, *, max_tokens: int) -> list[Prompt]:
    """All prompts of a file. `max_tokens` is for those that have no length, and the most of all.
    Raises StartupError, which names the entry that is wrong.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StartupError(f"dataset: {path.name}: {error.strerror or 'cannot be read'}") from None
    found = []
    for number, entry in enumerate(_entries(text), start=1):
        prompt = _prompt(entry, max_tokens)
        if prompt is None:
            raise StartupError(
                f"dataset: entry {number} needs a prompt, messages or conversations, each with text"
            )
        found.append(prompt)
    if not found:
        raise StartupError("dataset: it has no entries")
    return found


def _entries(text: bytes) -> Iterator[Any]:
    """Raises StartupError for what is not JSON."""
    lines = [text] if text.lstrip()[:1] == b"[" else text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = orjson.loads(line)
        except ValueError:
            raise StartupError(f"dataset: line {number} is not JSON") from None
        yield from value if isinstance(value, list) else [value]


def _prompt(entry: object, max_tokens: int) -> Prompt | None:
    """None if the entry has none of the forms."""
    if not isinstance(entry, dict):
        return None
    length = entry.get("max_tokens", max_tokens)
    if type(length) is not int or length < 1:
        return None
    text = entry.get("prompt")
    if text is None:
        turns = _turns(entry)
        text = next((said for role, said in turns if role in {"human", "user"}), None)
        answers = [said for role, said in turns if role in {"gpt", "assistant"}]
        if answers and "max_tokens" not in entry:
            length = max(1, len(answers[0]) // CHARACTERS)
    if not isinstance(text, str) or not text:
        return None
    return Prompt(text, min(length, max_tokens))


def _turns(entry: Mapping[str, object]) -> Sequence[tuple[str, str]]:
    """Who said what; empty if it is malformed."""
    for name, role, said in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = entry.get(name)
        if isinstance(turns, list):
            pairs = [(turn.get(role), turn.get(said)) for turn in turns if isinstance(turn, dict)]
            return [(a, b) for a, b in pairs if isinstance(a, str) and isinstance(b, str)]
    return ()
