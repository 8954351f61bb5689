"""Lookup: drafts from the earlier tokens of one sequence, what followed those like its last."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

LONGEST = 8  # tokens compared backwards
_CANDIDATES = 4  # earlier places looked at, the latest first


class Lookup:
    """Finds earlier occurrences of the last tokens of one sequence. Reads each token once.

    A dictionary maps each pair of tokens to its latest position, and a list each position to the
    previous one of the same pair (itself if there is none). Matches are compared backwards.
    """

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}  # pair -> position of its second token
        self._before: list[int] = [0]  # by position

    def find(self, tokens: Tokens[int]) -> tuple[int, int]:
        """(position, length) of the longest earlier match of the last tokens: its last position and
        its number of tokens. The latest of equally long ones; length 0 if not even two match.
        """
        self._read(tokens)
        best, longest = 0, 0
        last = place = len(tokens) - 1
        for _ in range(_CANDIDATES):
            if self._before[place] == place:
                break
            place = self._before[place]
            length = _match(tokens, place, last)
            if length > longest:
                best, longest = place, length
                if length == LONGEST:
                    break
        return best, longest

    def drafts(self, tokens: list[int], most: int) -> tuple[int, list[int]]:
        """Length of the longest match, and what followed it, at most `most` tokens."""
        place, length = self.find(tokens)
        return length, _continuation(tokens, place, most) if length else []

    def _read(self, tokens: Tokens[int]) -> None:
        latest, before = self._latest, self._before
        for position in range(len(before), len(tokens)):
            pair = tokens[position - 1] << 32 | tokens[position]
            before.append(latest.get(pair, position))
            latest[pair] = position


def _match(tokens: Tokens[int], place: int, last: int) -> int:
    """Number of equal tokens, backwards from `place` and from `last`; at most `LONGEST`."""
    length = 0
    most = min(LONGEST, place + 1)
    while length < most and tokens[place - length] == tokens[last - length]:
        length += 1
    return length


def _continuation(tokens: list[int], place: int, num: int) -> list[int]:
    """The `num` tokens after `place`, repeated periodically beyond the end."""
    after = tokens[place + 1 : place + 1 + num]
    return (after * -(-num // len(after)))[:num]
