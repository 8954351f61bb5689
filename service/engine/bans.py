"""BannedSequences: token sequences that an output must not contain.

A function of the output's tokens alone, those of earlier engines included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BannedSequences:
    """Finds the tokens that would complete a banned sequence. Single tokens are no part of it: they
    are banned at any position (see `singles`).
    """

    def __init__(self, sequences: Iterable[tuple[int, ...]]) -> None:
        self._by_end: dict[int, list[tuple[int, ...]]] = {}  # last but one token -> sequences
        self.context = 0  # earlier tokens that are compared
        for sequence in sequences:
            if len(sequence) > 1:
                self._by_end.setdefault(sequence[-2], []).append(sequence)
                self.context = max(self.context, len(sequence) - 1)

    def __bool__(self) -> bool:
        return bool(self._by_end)

    def after(self, output: Sequence[int]) -> set[int]:
        """The tokens that may not follow an output, of which the last `context` tokens suffice."""
        if not output:
            return set()
        found = self._by_end.get(output[-1], ())
        return {each[-1] for each in found if tuple(output[1 - len(each) :]) == each[:-1]}


def singles(sequences: Iterable[tuple[int, ...]]) -> set[int]:
    """The tokens that are banned at any position."""
    return {each[0] for each in sequences if len(each) == 1}
