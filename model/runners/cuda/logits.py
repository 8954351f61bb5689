"""What a step does with logits beside choosing tokens: masks, penalties and biases before, log
probabilities after. Launched and not waited for, like the rest of a step.

    adjust        changes the rows in place, as `model.sampler` orders it; gives back the unmodified
    read_extras   log probabilities of the chosen tokens
    score_rows    log probabilities of given tokens of a prompt, some rows at a time

Where a step does none of this and draws nothing, it needs no logits (`wants_likeliest_alone`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.batch import Batch, Floats, Ints, SamplingBatch
from model.kernels.matmul import Product
from model.runners.cuda.accelerator import Accelerator, Reading
from model.runners.cuda.network import FusedNetwork
from model.sampler import ScoredRows, score

_SCORED_AT_ONCE = 64  # rows whose logits over the whole vocabulary are in memory together


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """As `StepOutput` has them."""

    logprobs: Floats
    top_ids: Ints
    top_logprobs: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log probabilities on their way to the host, in pieces."""

    readings: tuple[tuple[Reading, Reading, Reading], ...]
    num_top: int = 0

    @classmethod
    def none(cls) -> Scores:
        """Nobody asked."""
        return cls(readings=())

    def wait(self) -> Logprobs:
        """All pieces, end to end."""
        pieces = [[reading.wait().numpy().copy() for reading in piece] for piece in self.readings]
        return Logprobs(
            logprobs=_join([p[0] for p in pieces], np.zeros(0, np.float32)),
            top_ids=_join([p[1] for p in pieces], np.zeros((0, self.num_top), np.int32)),
            top_logprobs=_join([p[2] for p in pieces], np.zeros((0, self.num_top), np.float32)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """The same of the rows that sampled: only some asked for them."""

    scores: Scores
    rows: npt.NDArray[np.intp]  # who asked
    num_rows: int

    @classmethod
    def none(cls) -> Extras:
        """Nobody asked."""
        return cls(scores=Scores.none(), rows=np.zeros(0, np.intp), num_rows=0)

    def wait(self) -> Logprobs:
        """Spread over all rows; the others hold 0. Nothing where nobody asked."""
        found = self.scores.wait()
        if not self.rows.size:
            return found
        return Logprobs(
            logprobs=_spread(found.logprobs, self.rows, self.num_rows),
            top_ids=_spread(found.top_ids, self.rows, self.num_rows),
            top_logprobs=_spread(found.top_logprobs, self.rows, self.num_rows),
        )


def wants_likeliest_alone(sampling: SamplingBatch) -> bool:
    """Whether all rows are greedy and nothing changes or reads their logits."""
    changed = sampling.bias_rows_E.size or sampling.penalty_rows_P.size or sampling.mask_rows_M.size
    read = sampling.wants_logprobs_R.any()
    return not changed and not read and not sampling.temperatures_R.any()


def adjust(logits_RV: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    """Applies masks, biases and penalties in place; returns the unmodified logits.

    That is a copy only where something changes. A row whose bias forbids everything is left with
    the likeliest token alone that its mask allows.
    """
    biased, penalised = bool(sampling.bias_rows_E.size), bool(sampling.penalty_rows_P.size)
    masked = bool(sampling.mask_rows_M.size)
    if not biased and not penalised and not masked:
        return logits_RV
    device = logits_RV.device
    raw_RV = logits_RV.clone()
    if masked:
        _mask_out(logits_RV, sampling)
    likeliest_R1 = logits_RV.argmax(-1, keepdim=True)
    if biased:
        at = (_long(sampling.bias_rows_E, device), _long(sampling.bias_ids_E, device))
        values_E = torch.tensor(sampling.bias_values_E, device=device)
        logits_RV.index_put_(at, values_E, accumulate=True)
    if penalised:
        rows, counts = sampling.penalty_rows_P, sampling.penalty_counts_P
        taken = sampling.frequency_R[rows] * counts + sampling.presence_R[rows] * (counts > 0)
        taken_P = torch.tensor(taken.astype(np.float32), device=device)
        repetition_P = torch.tensor(sampling.repetition_R[rows], device=device)
        at = (_long(rows, device), _long(sampling.penalty_ids_P, device))
        old_P = logits_RV[at]
        new_P = torch.where(old_P > 0, old_P / repetition_P, old_P * repetition_P)
        logits_RV[at] = new_P - taken_P
    if biased:
        unusable_R1 = ~logits_RV.amax(-1, keepdim=True).isfinite()
        alone_RV = torch.full_like(raw_RV, -torch.inf).scatter_(-1, likeliest_R1, 0.0)
        logits_RV.copy_(torch.where(unusable_R1, alone_RV, logits_RV))
    return raw_RV


def _mask_out(logits_RV: torch.Tensor, sampling: SamplingBatch) -> None:
    """Minus infinity for what masks forbid, in place. The bits are spread out on the device."""
    device, vocab_size = logits_RV.device, logits_RV.shape[-1]
    little = np.ascontiguousarray(sampling.masks_MW, dtype="<u4").view(np.uint8)
    bytes_MB1 = torch.tensor(little, device=device).unsqueeze(-1)
    places = torch.arange(8, dtype=torch.uint8, device=device)
    bits_MV = ((bytes_MB1 >> places) & 1).flatten(1)[:, :vocab_size].bool()
    rows_M = _long(sampling.mask_rows_M, device)
    logits_RV[rows_M] = logits_RV[rows_M].masked_fill(~bits_MV, -torch.inf)


def read_extras(
    raw_RV: torch.Tensor, tokens_R: torch.Tensor, sampling: SamplingBatch, accelerator: Accelerator
) -> Extras:
    """Log probabilities of the chosen tokens of the rows that want them."""
    rows = np.flatnonzero(sampling.wants_logprobs_R)
    if not rows.size:
        return Extras.none()
    picked = _long(rows, raw_RV.device)
    scored = score(raw_RV[picked], tokens_R[picked].long(), num_top=sampling.num_top)
    scores = Scores(readings=(_read(scored, accelerator),), num_top=sampling.num_top)
    return Extras(scores=scores, rows=rows, num_rows=len(tokens_R))


def score_rows(
    network: FusedNetwork,
    hidden: tuple[torch.Tensor, Product],
    batch: Batch,
    accelerator: Accelerator,
) -> Scores:
    """Log probabilities of the batch's given tokens, piece by piece."""
    device = accelerator.device
    pieces = []
    for start in range(0, len(batch.score_ids_Q), _SCORED_AT_ONCE):
        part = slice(start, start + _SCORED_AT_ONCE)
        rows_Q = torch.tensor(batch.score_rows_Q[part], device=device)
        logits_QV = torch.empty((len(rows_Q), network.config.vocab_size), device=device)
        network.logits(hidden, rows_Q, out_RV=logits_QV)
        ids_Q = _long(batch.score_ids_Q[part], device)
        pieces.append(_read(score(logits_QV, ids_Q, num_top=batch.score_num_top), accelerator))
    return Scores(readings=tuple(pieces), num_top=batch.score_num_top)


def _read(scored: ScoredRows, accelerator: Accelerator) -> tuple[Reading, Reading, Reading]:
    def read(tensor: torch.Tensor) -> Reading:
        return accelerator.read_back(tensor, accelerator.pinned(tensor.numel(), tensor.dtype))

    return read(scored.logprobs_Q), read(scored.top_ids_QN.int()), read(scored.top_logprobs_QN)


def _join(pieces: Sequence[npt.NDArray[Any]], empty: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate(pieces) if pieces else empty


def _spread(part: npt.NDArray[Any], rows: npt.NDArray[np.intp], count: int) -> npt.NDArray[Any]:
    whole = np.zeros((count, *part.shape[1:]), part.dtype)
    whole[rows] = part
    return whole


def _long(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device).long()
