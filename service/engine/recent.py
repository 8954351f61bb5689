"""RecentTexts: which token followed which others in the recent texts of one tenant.

Prompts often have passages of earlier prompts, outputs and tool results, and so do outputs. After
the same `ORDER` tokens the next one is often the same, too:

    key(t[i - ORDER : i]) -> t[i]        the newest text wins

A table of fixed size holds a part of the key and the token; a collision costs an older entry or, at
worst, a wrong draft. Each tenant has a table of its own, so that no tenant's speed depends on the
texts of another.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

ORDER = 4  # tokens of a key
ENTRIES = 2**16  # of a table: 8 bytes each
_MOST_READ = 2048  # tokens of a text at once, the last ones: the engine waits meanwhile

_CHECK = 2**31 - 1


class RecentTexts:
    """A table of one tenant. Used from one thread."""

    def __init__(self, entries: int = ENTRIES) -> None:
        """`entries`: a power of two."""
        self._mask = entries - 1
        self._table = array("q", bytes(8 * entries))

    def read(self, tokens: Sequence[int], start: int) -> None:
        """Adds what follows from the tokens from `start` on."""
        table, mask = self._table, self._mask
        for index in range(max(ORDER, start, len(tokens) - _MOST_READ), len(tokens)):
            key = hash(tuple(tokens[index - ORDER : index]))
            table[key & mask] = (key >> 31 & _CHECK) << 32 | tokens[index]

    def drafts(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow; none if nothing like the last tokens was read."""
        found: list[int] = []
        context = tuple(tokens[-ORDER:])
        while len(found) < most and len(context) == ORDER:
            key = hash(context)
            entry = self._table[key & self._mask]
            if not entry or entry >> 32 != key >> 31 & _CHECK:
                break
            found.append(entry & 0xFFFFFFFF)
            context = (*context[1:], found[-1])
        return found
