"""Detokenizer: token ids -> text, incrementally.

The text is a function of the ids alone, however they are grouped into steps or engines. Without
stop strings the parts together are exactly
`b"".join(bytes of the tokens).decode("utf-8", "replace")`. With stop strings that text is cut
before the first one that completes; of several that complete at the same character, before the
longest. With `include_stop` it is cut after it.

Held back are the bytes of an incomplete character and, without `include_stop`, the longest suffix
of the text that is a prefix of a stop string.

    text    | emitted ................ | held: prefix of a stop | bytes of a character |

Which tokens end an output, and which of them have text: see `output`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class _StopScan:
    """Length of the prefix of one stop string that the text ends with (Knuth-Morris-Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._borders = _borders(stop)

    def advance(self, char: str) -> bool:
        """Reads one character; True if it completes the stop string."""
        stop, matched = self.stop, self.matched
        while matched and stop[matched] != char:
            matched = self._borders[matched]
        if stop[matched] == char:
            matched += 1
        self.matched = matched
        return matched == len(stop)


def _borders(stop: str) -> list[int]:
    """At index m: length of the longest proper prefix of stop[:m] that is also its suffix."""
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
    """The text of one output. `token_bytes[id]` are the bytes of a token.

    Raises ValueError for an empty stop string.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        stop: tuple[str, ...] = (),
        *,
        include_stop: bool = False,
    ) -> None:
        if "" in stop:
            raise ValueError("a stop string must have at least 1 character")
        self.stopped_by: str | None = None  # once set, there is no more text
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._scans = [_StopScan(text) for text in stop]
        self._held = ""
        self._include_stop = include_stop

    def push(self, token: int) -> str:
        """Reads a token; returns the text that is no longer held back."""
        return self._read(self._decoder.decode(self._token_bytes[token]))

    def finish(self) -> str:
        """Returns all text held back; an incomplete character becomes one U+FFFD."""
        text = self._read(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

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
                return text[: index if self._include_stop else index - len(self.stopped_by)]
        held = 0 if self._include_stop else max(scan.matched for scan in self._scans)
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]
