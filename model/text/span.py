"""How much text one token can stand for: what makes "this text cannot fit" known before tokenising.

A tokenizer has such a bound if no text is lost on its way to tokens. The steps that are known to
keep all text are listed here; with any other step there is no bound, and text must be tokenised to
learn its length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

# Step -> how many bytes of its input one byte of its output can stand for. Such as three Hangul
# letters of 3 bytes each that NFC makes one syllable of 3 bytes, or a bold "a" of 4 bytes in NFKC.
_NORMALIZERS = {"NFC": 3, "NFD": 3, "NFKC": 4, "NFKD": 4, "Prepend": 1}
_SPLITTERS = frozenset({"ByteLevel", "Metaspace", "Digits", "Punctuation"})
# No text in UTF-8 has other bytes.
_BYTES_OF_TEXT = frozenset(range(0xF5)) - {0xC0, 0xC1}


@dataclass(frozen=True, slots=True)
class Span:
    """At most `longest` bytes of text become one token; `dropped` bytes may become none."""

    longest: int
    dropped: bytes = b""

    def fewest_tokens(self, texts: Iterable[str]) -> int:
        """A lower bound of the tokens that texts have together, in a fraction of the time."""
        size = sum(len(text.encode().translate(None, self.dropped)) for text in texts)
        return -(-size // self.longest)


def find_span(splitter: Tokenizer, token_bytes: Sequence[bytes]) -> Span | None:
    """The bound of a tokenizer; None if it has none."""
    single = {piece[0] for piece in token_bytes if len(piece) == 1}
    dropped = bytes(sorted(_BYTES_OF_TEXT - single))
    steps = list(_steps(splitter.pre_tokenizer, "pretokenizers"))
    by_bytes = any(step["type"] == "ByteLevel" for step in steps)
    if not by_bytes and (dropped or not getattr(splitter.model, "byte_fallback", False)):
        return None  # unknown characters may become one token together
    if dropped and splitter.normalizer is not None:  # other bytes may become those
        return None
    if not all(map(_keeps_text, steps)) or _swallows_blanks(splitter):
        return None
    shrinking = 1
    for step in _steps(splitter.normalizer, "normalizers"):
        factor = _shrinking(step)
        if factor is None:
            return None
        shrinking *= factor
    return Span(shrinking * max(map(len, token_bytes)), dropped)


def _steps(step: Any, inner: str) -> Iterator[dict[str, Any]]:  # noqa: ANN401  # of the library
    """The parts of a normalizer or a splitter, as its file has them."""
    if step is None:
        return
    state = json.loads(step.__getstate__())
    if state["type"] == "Sequence":
        yield from state[inner]
    else:
        yield state


def _keeps_text(step: dict[str, Any]) -> bool:
    if step["type"] == "Split":
        return step.get("behavior") != "Removed"
    return step["type"] in _SPLITTERS


def _shrinking(step: dict[str, Any]) -> int | None:
    if step["type"] != "Replace":
        return _NORMALIZERS.get(step["type"])
    pattern = step["pattern"].get("String")
    grows = pattern and len(step["content"].encode()) >= len(pattern.encode())
    return 1 if grows else None


def _swallows_blanks(splitter: Tokenizer) -> bool:
    """Whether an added token absorbs adjacent blanks, however many."""
    added = splitter.get_added_tokens_decoder().values()
    return any(not token.special and (token.lstrip or token.rstrip) for token in added)
