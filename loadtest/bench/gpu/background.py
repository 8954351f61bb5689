"""BackgroundLoad: a runner whose every step holds other sequences besides the given ones.

So a trial of one text becomes a trial next to N others, however the text is computed: prompts in
chunks are computed in steps that decode the others, decoded tokens in decode steps of N + 1 rows.
Each of the others decodes a token per step, up to a length of its own, and starts again.

    rows of a step     others, first half | given rows | others, second half
    blocks             given: from 0      others: at the end of the pool
    batch slots        given: 0, 1        others: from 2
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from model.batch import Batch, Ints, SamplingBatch, StepOutput
from model.runners import Runner

_FIRST_SLOT = 2
_Scalar = TypeVar("_Scalar", bound=np.generic)


class BackgroundLoad:
    """Wraps a runner. The first `alone` steps hold no others: they compute the reference."""

    def __init__(self, runner: Runner, *, others: int, alone: int, room: int = 64) -> None:
        self._runner = runner
        self._alone = alone
        self._stored = np.zeros(others, np.int32)
        self._ends = 3 + np.arange(others, dtype=np.int32) * 7 % (room - 3)
        each = -(-room // runner.block_size)
        blocks = runner.num_blocks - each * others + np.arange(each * others, dtype=np.int32)
        self._table = blocks.reshape(others, each).astype(np.int32)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of the runner
        return getattr(self._runner, name)

    def run(self, batch: Batch) -> StepOutput:
        """Computes the step with the others; returns the rows of `batch`."""
        if self._alone or not len(self._stored):
            self._alone = max(0, self._alone - 1)
            return self._runner.run(batch)
        front = len(self._stored) // 2
        output = self._runner.run(self._join(batch, front))
        self._stored += 1
        self._stored[self._stored >= self._ends] = 0
        own = slice(front, front + len(batch.sample_rows_R))
        return replace(
            output,
            tokens_R=output.tokens_R[own],
            logprobs_R=output.logprobs_R[own],
            top_ids_RN=output.top_ids_RN[own],
            top_logprobs_RN=output.top_logprobs_RN[own],
        )

    def _join(self, batch: Batch, front: int) -> Batch:
        stored, vocab_size = self._stored, self.config.vocab_size
        numbers = np.arange(len(stored), dtype=np.int32)
        tokens = ((stored + 1) * (numbers + 7919) % vocab_size).astype(np.int32)
        lengths = _around(np.ones_like(stored), np.diff(batch.query_starts_S1), front)
        sampled = len(batch.sample_rows_R)
        rows = np.arange(batch.num_tokens + len(stored), dtype=np.int32)
        sampling = batch.sampling
        table, given_table = _same_width(self._table, batch.block_table_SB)
        return replace(
            batch,
            tokens_T=_around(tokens, batch.tokens_T, front),
            positions_T=_around(stored, batch.positions_T, front),
            query_starts_S1=np.cumsum([0, *lengths]).astype(np.int32),
            context_lens_S=_around(stored + 1, batch.context_lens_S, front),
            block_table_SB=_around(table, given_table, front),
            batch_slots_S=_around(numbers + _FIRST_SLOT, batch.batch_slots_S, front),
            sample_rows_R=np.concatenate(
                [rows[:front], batch.sample_rows_R + front, rows[front + batch.num_tokens :]]
            ),
            sampling=SamplingBatch.plain(
                sampled + len(stored),
                vocab_size=vocab_size,
                temperature=float(sampling.temperatures_R[0]) if sampled else 0.7,
                seeds_R=_around(numbers.astype(np.uint64), sampling.seeds_R, front),
                indices_R=_around(stored, sampling.indices_R, front),
                num_top=sampling.num_top or None,
            ),
        )


def _around(
    others: npt.NDArray[_Scalar], own: npt.NDArray[_Scalar], front: int
) -> npt.NDArray[_Scalar]:
    return np.concatenate([others[:front], own, others[front:]])


def _same_width(one: Ints, other: Ints) -> tuple[Ints, Ints]:
    width = max(one.shape[1], other.shape[1])
    return _padded(one, width), _padded(other, width)


def _padded(table: Ints, width: int) -> Ints:
    return np.pad(table, ((0, 0), (0, width - table.shape[1])))
