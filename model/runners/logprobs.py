"""Log probabilities of a step on the host, and the StepOutput that they are part of.

Shared by all runners, and without torch for those that do not use it. Legend: `model.batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model.batch import Batch, Floats, Ints, StepOutput

if TYPE_CHECKING:
    import torch

    from model.sampler import ScoredRows

SCORED_AT_ONCE = 64  # rows whose logits over the whole vocabulary are in memory together


class Logprobs(NamedTuple):
    """Of one token per row and of the top-k tokens; no rows if none were requested."""

    logprobs: Floats
    top_ids: Ints
    top_logprobs: Floats

    @classmethod
    def from_tensors(cls, *columns: torch.Tensor) -> Logprobs:
        """From log probabilities, top-k ids and top-k log probabilities on any device."""
        logprobs, top_ids, top_logprobs = (column.cpu() for column in columns)
        return cls(logprobs.numpy(), top_ids.int().numpy(), top_logprobs.numpy())

    @classmethod
    def join(cls, parts: Iterable[Logprobs]) -> Logprobs:
        """The rows of all parts, in order."""
        columns = list(zip(*parts, strict=True))
        return cls(*map(np.concatenate, columns)) if columns else NO_LOGPROBS

    def spread(self, rows: npt.NDArray[np.intp], count: int) -> Logprobs:
        """Puts the rows at their places among `count` rows; the others are 0."""
        return Logprobs(*(_spread(column, rows, count) for column in self))


NO_LOGPROBS = Logprobs(
    np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32)
)


def score_rows(batch: Batch, logits_of: Callable[[Ints], torch.Tensor]) -> Iterator[ScoredRows]:
    """Scores the batch's given tokens, some rows at a time.

    `logits_of` computes the logits of rows of T; it may reuse its memory from call to call.
    """
    if not batch.score_rows_Q.size:
        return
    from model.sampler import score

    for start in range(0, len(batch.score_rows_Q), SCORED_AT_ONCE):
        part = slice(start, start + SCORED_AT_ONCE)
        logits_QV = logits_of(batch.score_rows_Q[part])
        yield score(logits_QV, batch.score_ids_Q[part], num_top=batch.score_num_top)


def scored_on_host(parts: Iterable[ScoredRows]) -> Logprobs:
    """What `score_rows` yields, copied to the host."""
    return Logprobs.join(
        Logprobs.from_tensors(part.logprobs_Q, part.top_ids_QN, part.top_logprobs_QN)
        for part in parts
    )


def step_output(
    tokens_R: Ints, sampled: Logprobs, scored: Logprobs, *, seconds: float | None = None
) -> StepOutput:
    """The result of a step: sampled tokens, their log probabilities, those of given tokens."""
    return StepOutput(
        tokens_R=tokens_R,
        logprobs_R=sampled.logprobs,
        top_ids_RN=sampled.top_ids,
        top_logprobs_RN=sampled.top_logprobs,
        score_logprobs_Q=scored.logprobs,
        score_top_ids_QN=scored.top_ids,
        score_top_logprobs_QN=scored.top_logprobs,
        seconds=seconds,
    )


def _spread(part: npt.NDArray[Any], rows: npt.NDArray[np.intp], count: int) -> npt.NDArray[Any]:
    spread = np.zeros((count, *part.shape[1:]), part.dtype)
    spread[rows] = part
    return spread
