"""Detokenizer: the token ids of an answer -> its text, piece by piece.

The text is a function of the ids alone: how they were grouped into steps, or that another engine
began the answer, changes nothing. Without stop strings the pieces are together exactly
`b"".join(bytes of the tokens).decode("utf-8", "replace")`. With stop strings that text is cut
before the first one to be complete; of several that are complete at one character, before the
longest.

What is not certain yet is held back: bytes of an unfinished character, and the longest end of the
text that a stop string may begin with.

    text    | emitted ................ | held: may begin a stop | bytes of a character |

Which tokens end an answer, and which of them have text, is `answer`'s concern.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence


class _StopScan:
    """How much of one stop string the text ends with: Knuth, Morris and Pratt's automaton."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._borders = _borders(stop)

    def advance(self, char: str) -> bool:
        """Reads one character; True where it completes the stop string."""
        stop, matched = self.stop, self.matched
        while matched and stop[matched] != char:
            matched = self._borders[matched]
        if stop[matched] == char:
            matched += 1
        self.matched = matched
        return matched == len(stop)


def _borders(stop: str) -> list[int]:
    """`[m]`: length of the longest proper prefix of stop[:m] that is also its suffix."""
    borders = [0] * (len(stop) + 1)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = borders[length]
        if stop[index] == stop[length]:
            length += 1
        borders[index + 1] = length
    return borders


class Detokenizer:
    """The text of one answer. `token_bytes[id]` is what a token stands for.

    Raises ValueError for an empty stop string.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: tuple[str, ...] = ()) -> None:
        if "" in stop:
            raise ValueError("a stop string must have at least 1 character")
        self.stopped_by: str | None = None  # once set, there is no more text
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._scans = [_StopScan(text) for text in stop]
        self._held = ""

    def push(self, token: int) -> str:
        """Reads a token; returns the text that became certain."""
        return self._read(self._decoder.decode(self._token_bytes[token]))

    def finish(self) -> str:
        """Returns all text that remains; an unfinished character becomes one U+FFFD."""
        text = self._read(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def replay(self, tokens: Iterable[int]) -> str:
        """Reads tokens that are journalled already; returns the text they made certain."""
        return "".join([self.push(token) for token in tokens])

    def _read(self, new: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self._scans:
            return new
        text = self._held + new
        for index, char in enumerate(new, start=len(self._held) + 1):
            complete = [scan.stop for scan in self._scans if scan.advance(char)]
            if complete:
                self.stopped_by = max(complete, key=len)
                self._held = ""
                return text[: index - len(self.stopped_by)]
        certain = len(text) - max(scan.matched for scan in self._scans)
        self._held = text[certain:]
        return text[:certain]
