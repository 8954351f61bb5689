"""Reference attention: one sequence, one head at a time, the softmax written out, in float64.

Other backends are tested against it. Slow on purpose; not differentiable.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from model.batch import Batch


class ReferenceAttention:
    """Gathers each sequence's K and V by its block table and attends row by row."""

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []
        self._rows: list[range] = []

    def prepare(self, batch: Batch, *, block_size: int, device: torch.device) -> None:
        starts = batch.query_starts_S1.tolist()
        self._rows = [range(a, b) for a, b in pairwise(starts)]
        self._slots = []
        for table, length in zip(batch.block_table_SB, batch.context_lens_S.tolist(), strict=True):
            places = [
                int(table[position // block_size]) * block_size + position % block_size
                for position in range(length)
            ]
            self._slots.append(torch.tensor(places, device=device))

    def attend(
        self,
        queries_THD: torch.Tensor,
        keys_XKD: torch.Tensor,
        values_XKD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        mixed_THD = torch.empty_like(queries_THD)
        group = queries_THD.shape[1] // keys_XKD.shape[1]
        for rows, slots in zip(self._rows, self._slots, strict=True):
            keys, values = keys_XKD[slots].double(), values_XKD[slots].double()
            for offset, row in enumerate(rows):
                end = len(slots) - len(rows) + offset + 1  # positions 0 .. end - 1 are visible
                start = 0 if window is None else max(0, end - window)
                for head in range(queries_THD.shape[1]):
                    query = queries_THD[row, head].double()
                    scores = keys[start:end, head // group] @ query * scale
                    weights = torch.exp(scores - scores.max())
                    weights /= weights.sum()
                    mixed_THD[row, head] = weights @ values[start:end, head // group]
        return mixed_THD
