"""PenaltyCounts: token counts of one output, for penalties. Shapes: `model.batch`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from model.batch import Ints
from service.engine.sequence import Sequence


class PenaltyCounts:
    """How often each token occurs in an output: two growing arrays, updated when read.

    Tokens of the prompt count 0; they are listed only for a repetition penalty.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self._index = {token: index for index, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.fromiter(self._index, np.int32, len(self._index))
        self._counts = np.zeros(len(self._index), np.int32)
        self._num_read = 0

    def rows(self, sequence: Sequence, drafts: list[int]) -> list[tuple[Ints, Ints]]:
        """Distinct ids and counts: over the output so far, then including each of the drafts."""
        ids, counts = self._read(sequence)
        rows = [(ids, counts)]
        for draft in drafts:
            place = np.flatnonzero(ids == draft)
            if place.size:
                counts = counts.copy()
                counts[place[0]] += 1
            else:
                ids = np.append(ids, np.int32(draft))
                counts = np.append(counts, np.int32(1))
            rows.append((ids, counts))
        return rows

    def _read(self, sequence: Sequence) -> tuple[Ints, Ints]:
        for token in sequence.tokens[sequence.num_prompt + self._num_read :]:
            index = self._index.setdefault(token, len(self._index))
            if index >= len(self._ids):
                self._grow()
            self._ids[index] = token
            self._counts[index] += 1
        self._num_read = len(sequence.tokens) - sequence.num_prompt
        return self._ids[: len(self._index)], self._counts[: len(self._index)]

    def _grow(self) -> None:
        room = max(16, len(self._ids))
        self._ids = np.concatenate([self._ids, np.zeros(room, np.int32)])
        self._counts = np.concatenate([self._counts, np.zeros(room, np.int32)])
