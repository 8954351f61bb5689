"""What a step does with logits besides sampling: masks, penalties and biases before, log
probabilities after. Launched without waiting, like the rest of a step.

    adjust          changes the rows in place, in the order of `model.sampler`
    read_logprobs   log probabilities of the sampled tokens
    read_scores     log probabilities of given tokens of a prompt, some rows at a time

A step that does none of this and is greedy needs no logits (`is_plain_greedy`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.batch import Batch, Ints, SamplingBatch
from model.kernels.matmul import Product
from model.runners.cuda.accelerator import Accelerator, PendingCopy
from model.runners.cuda.network import FusedNetwork
from model.runners.logprobs import NO_LOGPROBS, Logprobs, score_rows
from model.sampler import ScoredRows, apply_bias_and_penalties, on_device, score


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log probabilities on their way to the host, in parts."""

    parts: tuple[tuple[PendingCopy, ...], ...] = ()  # each as the columns of Logprobs
    rows: npt.NDArray[np.intp] | None = None  # their places among `num_rows`; None: in order
    num_rows: int = 0

    def wait(self) -> Logprobs:
        """All rows; those that requested none hold 0. No rows if there are no parts."""
        if not self.parts:
            return NO_LOGPROBS
        found = Logprobs.join(
            Logprobs(*(values().numpy().copy() for values in part)) for part in self.parts
        )
        return found if self.rows is None else found.spread(self.rows, self.num_rows)


NOTHING_TO_READ = PendingLogprobs()


def is_plain_greedy(sampling: SamplingBatch) -> bool:
    """Whether all rows are greedy and nothing changes or reads their logits."""
    changed = sampling.bias_rows_E.size or sampling.penalty_rows_P.size or sampling.mask_rows_M.size
    read = sampling.wants_logprobs_R.any()
    return not changed and not read and not sampling.temperatures_R.any()


def adjust(logits_RV: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    """Applies masks, biases and penalties in place; returns the unmodified logits.

    Those are a copy only if something changes. A row whose bias forbids every token keeps the
    argmax of the tokens that its mask allows, and nothing else.
    """
    biased = bool(sampling.bias_rows_E.size)
    if not biased and not sampling.penalty_rows_P.size and not sampling.mask_rows_M.size:
        return logits_RV
    raw_RV = logits_RV.clone()
    if sampling.mask_rows_M.size:
        _mask_out(logits_RV, sampling)
    argmax_R1 = logits_RV.argmax(-1, keepdim=True)
    apply_bias_and_penalties(logits_RV, sampling)
    if biased:
        unusable_R1 = ~logits_RV.amax(-1, keepdim=True).isfinite()
        alone_RV = torch.full_like(raw_RV, -torch.inf).scatter_(-1, argmax_R1, 0.0)
        logits_RV.copy_(torch.where(unusable_R1, alone_RV, logits_RV))
    return raw_RV


def _mask_out(logits_RV: torch.Tensor, sampling: SamplingBatch) -> None:
    """Minus infinity for what masks forbid, in place. The bits are unpacked on the device."""
    device, vocab_size = logits_RV.device, logits_RV.shape[-1]
    little = np.ascontiguousarray(sampling.masks_MW, dtype="<u4").view(np.uint8)
    bytes_MB1 = on_device(little, device).unsqueeze(-1)
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    bits_MV = ((bytes_MB1 >> shifts) & 1).flatten(1)[:, :vocab_size].bool()
    rows_M = on_device(sampling.mask_rows_M, device).long()
    logits_RV[rows_M] = logits_RV[rows_M].masked_fill(~bits_MV, -torch.inf)


def read_logprobs(
    raw_RV: torch.Tensor, tokens_R: torch.Tensor, sampling: SamplingBatch, accelerator: Accelerator
) -> PendingLogprobs:
    """Log probabilities of the sampled tokens of the rows that requested them."""
    rows = np.flatnonzero(sampling.wants_logprobs_R)
    if not rows.size:
        return NOTHING_TO_READ
    picked = on_device(rows, raw_RV.device)
    scored = score(raw_RV[picked], tokens_R[picked].long(), num_top=sampling.num_top)
    return PendingLogprobs((_read(scored, accelerator),), rows, len(tokens_R))


def read_scores(
    network: FusedNetwork,
    hidden: tuple[torch.Tensor, Product | None],
    batch: Batch,
    accelerator: Accelerator,
) -> PendingLogprobs:
    """Log probabilities of the batch's given tokens."""

    def logits_of(rows: Ints) -> torch.Tensor:
        rows_Q = on_device(rows, accelerator.device)
        logits_QV = torch.empty((len(rows), network.config.vocab_size), device=accelerator.device)
        network.logits(hidden, rows_Q, out_RV=logits_QV)
        return logits_QV

    return PendingLogprobs(
        tuple(_read(scored, accelerator) for scored in score_rows(batch, logits_of))
    )


def _read(scored: ScoredRows, accelerator: Accelerator) -> tuple[PendingCopy, ...]:
    def read(tensor: torch.Tensor) -> PendingCopy:
        return accelerator.read_back(tensor, accelerator.pinned(tensor.numel(), tensor.dtype))

    return read(scored.logprobs_Q), read(scored.top_ids_QN.int()), read(scored.top_logprobs_QN)
