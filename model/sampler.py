"""Sampler: logits and sampling columns in, one token per row out, log probabilities if requested.

Order of operations, as in vLLM (which differs from Hugging Face in taking min-p first):

    0  tokens that a mask forbids are removed for good                     adjusted logits
    1  logit bias
    2  repetition penalty (Keskar et al., arXiv 1909.05858), over prompt and answer
    3  frequency and presence penalty (as OpenAI documents them), over the answer
    4  temperature; 0 is greedy: argmax, the lowest id among equals; nothing below applies
    5  min-p: removes tokens below min_p times the largest probability
    6  top-k: keeps the k most probable; among equals the lower id ranks first
    7  top-p: of these, keeps the shortest descending run with at least top_p of their mass
    8  inverse CDF of one uniform number per row; by id, or by descending probability after 6 or 7

A row whose bias forbids every token takes the argmax of the unmodified logits among the tokens
that its mask allows. Log probabilities are always those of the unmodified logits.

A row gives the same bits alone, in any batch and with any number of threads. Probabilities are
therefore summed as integers: a token weighs floor(2**40 * exp((logit - largest) / temperature)),
and integer sums do not depend on their order. Tokens below 1e-12 of the largest count as zero. The
exponential is the true one rounded to float32, and logarithms are spelled out, so that the bits do
not depend on a library's approximations either; `model/native/src/sampler.cpp` computes the same.

It does not decide when an answer ends, and it keeps nothing between steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.batch import Ints, SamplingBatch, unpack_masks
from model.philox import uniforms

_ONE = 2.0**40  # weight of the most probable token; sums stay below 2**63 up to 2**23 tokens
_CANDIDATES = (128, 4096)  # tokens sorted in a first and a second attempt; after that, all

_Rows = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """The chosen tokens. Log probabilities have no rows if no row requests them."""

    tokens_R: torch.Tensor  # int64
    logprobs_R: torch.Tensor  # float32
    top_ids_RN: torch.Tensor  # int64, most probable first
    top_logprobs_RN: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRows:
    """Log probabilities of given tokens and of the most probable ones."""

    logprobs_Q: torch.Tensor  # float32
    top_ids_QN: torch.Tensor  # int64, most probable first
    top_logprobs_QN: torch.Tensor


def sample(logits_RV: torch.Tensor, sampling: SamplingBatch) -> SampledRows:
    """Chooses one token per row. The logits are left as they are."""
    logits_RV = logits_RV.float()
    allowed_RV = mask_out(logits_RV, sampling)
    adjusted_RV = _adjust(allowed_RV, sampling)
    tokens_R = _choose(adjusted_RV, sampling)
    if sampling.bias_rows_E.size:
        usable_R = adjusted_RV.amax(-1).isfinite()
        tokens_R = torch.where(usable_R, tokens_R, allowed_RV.argmax(-1))
    wanted = np.flatnonzero(sampling.wants_logprobs_R)
    if not wanted.size:
        none = logits_RV.new_empty(0)
        ids = tokens_R.new_empty((0, 0))
        return SampledRows(
            tokens_R=tokens_R, logprobs_R=none, top_ids_RN=ids, top_logprobs_RN=none.view(0, 0)
        )
    scored = score(_take(logits_RV, wanted), _take(tokens_R, wanted), num_top=sampling.num_top)
    return SampledRows(
        tokens_R=tokens_R,
        logprobs_R=_spread(scored.logprobs_Q, wanted, rows=len(tokens_R)),
        top_ids_RN=_spread(scored.top_ids_QN, wanted, rows=len(tokens_R)),
        top_logprobs_RN=_spread(scored.top_logprobs_QN, wanted, rows=len(tokens_R)),
    )


def score(logits_QV: torch.Tensor, ids_Q: torch.Tensor | Ints, *, num_top: int) -> ScoredRows:
    """Log probabilities of `ids_Q`, one per row, and of the `num_top` most probable (at most V)."""
    logits_QV = logits_QV.float()
    if isinstance(ids_Q, np.ndarray):
        ids_Q = on_device(ids_Q, logits_QV.device)
    ids_Q = ids_Q.long()
    num_top = min(num_top, logits_QV.shape[-1])
    largest_Q1 = logits_QV.amax(-1, keepdim=True)
    mass_Q = _weights(logits_QV, largest_Q1).sum(-1)
    log_sum_Q1 = _log(mass_Q.double() / _ONE).unsqueeze(-1)
    top_ids_QN = _largest(logits_QV, num_top)
    ids_QM = torch.cat((ids_Q.unsqueeze(-1), top_ids_QN), dim=-1)
    logprobs_QM = ((logits_QV.gather(-1, ids_QM) - largest_Q1).double() - log_sum_Q1).float()
    return ScoredRows(
        logprobs_Q=logprobs_QM[:, 0], top_ids_QN=top_ids_QN, top_logprobs_QN=logprobs_QM[:, 1:]
    )


def mask_out(logits_RV: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    """Sets masked-out logits to minus infinity; returns the same tensor if no row has a mask."""
    if not sampling.mask_rows_M.size:
        return logits_RV
    device, vocab_size = logits_RV.device, logits_RV.shape[-1]
    forbidden_MV = torch.from_numpy(unpack_masks(~sampling.masks_MW, vocab_size)).to(device)
    rows_M = sampling.mask_rows_M.astype(np.intp)
    masked_MV = _take(logits_RV, rows_M).masked_fill(forbidden_MV, -torch.inf)
    if len(rows_M) == len(logits_RV):
        return masked_MV
    return logits_RV.index_copy(0, _index(rows_M, device), masked_MV)


def _adjust(logits_RV: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    """Applies bias and penalties; returns the logits themselves if no row has any."""
    if not sampling.bias_rows_E.size and not sampling.penalty_rows_P.size:
        return logits_RV
    adjusted_RV = logits_RV.clone()
    apply_bias_and_penalties(adjusted_RV, sampling)
    return adjusted_RV


def apply_bias_and_penalties(logits_RV: torch.Tensor, sampling: SamplingBatch) -> None:
    """Adds biases, then applies penalties, in place."""
    device = logits_RV.device
    if sampling.bias_rows_E.size:
        # Accumulated, because a client's bias and a forbidden end may meet in one token.
        rows_E, ids_E = _index(sampling.bias_rows_E, device), _index(sampling.bias_ids_E, device)
        values_E = on_device(sampling.bias_values_E, device)
        logits_RV.index_put_((rows_E, ids_E), values_E, accumulate=True)
    if sampling.penalty_rows_P.size:
        rows, counts = sampling.penalty_rows_P, sampling.penalty_counts_P
        taken = sampling.frequency_R[rows] * counts + sampling.presence_R[rows] * (counts > 0)
        taken_P = on_device(taken.astype(np.float32), device)
        repetition_P = on_device(sampling.repetition_R[rows], device)
        at = (_index(rows, device), _index(sampling.penalty_ids_P, device))
        old_P = logits_RV[at]
        new_P = torch.where(old_P > 0, old_P / repetition_P, old_P * repetition_P)
        logits_RV[at] = new_P - taken_P


def _choose(adjusted_RV: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
    """Chooses per row by the cheapest method: greedy, by id, or by descending probability."""
    vocab_size = adjusted_RV.shape[-1]
    greedy = sampling.temperatures_R == 0
    cut = ~greedy & ((sampling.top_ks_R < vocab_size) | (sampling.top_ps_R < 1))
    if greedy.all():
        return adjusted_RV.argmax(-1)
    draws_R = uniforms(sampling.seeds_R, sampling.choices_R, sampling.indices_R)
    tokens_R = torch.empty(len(adjusted_RV), dtype=torch.int64, device=adjusted_RV.device)
    for mask, choose in ((greedy, None), (cut, _choose_by_rank), (~greedy & ~cut, _choose_by_id)):
        rows = np.flatnonzero(mask)
        if not rows.size:
            continue
        logits = _take(adjusted_RV, rows)
        chosen = logits.argmax(-1) if choose is None else choose(logits, sampling, rows, draws_R)
        tokens_R[_index(rows, tokens_R.device)] = chosen
    return tokens_R


def _choose_by_id(
    logits_RV: torch.Tensor, sampling: SamplingBatch, rows: _Rows, draws: npt.NDArray[np.float64]
) -> torch.Tensor:
    """Inverse CDF in order of ids."""
    weights_RV = _tempered(logits_RV, sampling, rows)
    sums_RV = weights_RV.cumsum(-1)
    return _draw(sums_RV, sums_RV[:, -1:], draws[rows])


def _choose_by_rank(
    logits_RV: torch.Tensor, sampling: SamplingBatch, rows: _Rows, draws: npt.NDArray[np.float64]
) -> torch.Tensor:
    """Inverse CDF over the tokens that top-k and top-p keep, most probable first.

    Only the most probable tokens are sorted, and more if a row turns out to need more. A GPU sorts
    all at once rather than wait for the answer to that question.
    """
    vocab_size, device = logits_RV.shape[-1], logits_RV.device
    weights_RV = _tempered(logits_RV, sampling, rows)
    tokens_R = torch.empty(len(rows), dtype=torch.int64, device=device)
    open_rows = np.arange(len(rows))
    sizes = [size for size in _CANDIDATES if size < vocab_size and device.type == "cpu"]
    for size in (*sizes, vocab_size):
        ids_RC = _largest(_take(logits_RV, open_rows), size)
        weights = _take(weights_RV, open_rows)
        top_ks, top_ps = sampling.top_ks_R[rows[open_rows]], sampling.top_ps_R[rows[open_rows]]
        sums_RC, mass_R1, settled_R = _nucleus(weights, ids_RC, top_ks, top_ps)
        drawn = _draw(sums_RC, mass_R1, draws[rows[open_rows]])
        # A row that is not settled gets a token that the next round overwrites.
        tokens_R[_index(open_rows, device)] = ids_RC.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        if size == vocab_size or bool(settled_R.all()):
            break
        open_rows = open_rows[~settled_R.numpy()]
    return tokens_R


def _nucleus(
    weights_RV: torch.Tensor,
    ids_RC: torch.Tensor,
    top_ks: Ints,
    top_ps: npt.NDArray[np.float32],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Running sums of the candidates, the mass that both cuts keep, and whether that is final.

    It is final if the candidates hold all that top-k keeps, or as much of it as top-p requires.
    """
    vocab_size, size = weights_RV.shape[-1], ids_RC.shape[-1]
    device = weights_RV.device
    top_ks_R1 = _index(top_ks, device).unsqueeze(-1)
    top_ps_R1 = torch.as_tensor(top_ps, device=device).double().unsqueeze(-1)
    weights_RC = weights_RV.gather(-1, ids_RC)
    sums_RC = weights_RC.cumsum(-1)
    total_R1 = weights_RV.sum(-1, keepdim=True)
    inside_R1 = top_ks_R1 <= size
    first_k_R1 = sums_RC.gather(-1, (top_ks_R1.clamp(max=size) - 1))
    first_k_R1 = torch.where(inside_R1, first_k_R1, total_R1)
    known_R1 = inside_R1 | (top_ks_R1 >= vocab_size) | (sums_RC[:, -1:] == total_R1)
    wanted_R1 = first_k_R1.double() * top_ps_R1
    before_RC = (sums_RC - weights_RC).double()
    kept_RC = before_RC < wanted_R1
    kept_RC[:, 0] = True  # top_p 0 leaves one
    mass_R1 = torch.minimum((weights_RC * kept_RC).sum(-1, keepdim=True), first_k_R1)
    settled_R1 = inside_R1 | (known_R1 & (sums_RC[:, -1:].double() >= wanted_R1))
    return sums_RC, mass_R1, settled_R1.squeeze(-1)


def _tempered(logits_RV: torch.Tensor, sampling: SamplingBatch, rows: _Rows) -> torch.Tensor:
    """Weights at each row's temperature, without what min-p takes away."""
    device = logits_RV.device
    temperatures_R1 = torch.as_tensor(sampling.temperatures_R[rows], device=device).unsqueeze(-1)
    weights_RV = _weights(logits_RV, logits_RV.amax(-1, keepdim=True), temperatures_R1)
    min_ps = sampling.min_ps_R[rows]
    if min_ps.any():
        least = np.ceil(min_ps.astype(np.float64) * _ONE).astype(np.int64)
        weights_RV *= weights_RV >= torch.as_tensor(least, device=device).unsqueeze(-1)
    return weights_RV


def _weights(
    logits_RV: torch.Tensor, largest_R1: torch.Tensor, temperatures_R1: torch.Tensor | None = None
) -> torch.Tensor:
    """Unnormalised probabilities as integers; the most probable token weighs 2**40."""
    scaled_RV = logits_RV - largest_R1
    if temperatures_R1 is not None:
        scaled_RV /= temperatures_R1
    # Below -28 a token weighs nothing; the clamp keeps denormal numbers out, which are slow. Of all
    # float32 in that range, none is rounded otherwise because its exponential is in float64.
    return scaled_RV.clamp_(min=-80.0).double().exp_().float().mul_(_ONE).long()


def _log(x: torch.Tensor) -> torch.Tensor:
    """The natural logarithm of float64 above 0, by operations that round alike everywhere.

    x = m 2**e with m from sqrt(1/2) to sqrt(2); log m = 2 artanh r, r = (m - 1) / (m + 1).
    """
    m, e = torch.frexp(x)
    low = m < 0.7071067811865476
    m, e = torch.where(low, m * 2.0, m), torch.where(low, e - 1, e)
    r = (m - 1.0) / (m + 1.0)
    s = r * r
    p = torch.full_like(s, 1.0 / 23.0)
    for odd in range(21, 1, -2):
        p = p * s + 1.0 / odd
    return (p * s * r + r) * 2.0 + e.double() * 0.6931471805599453


def _draw(
    sums_RC: torch.Tensor, mass_R1: torch.Tensor, draws: npt.NDArray[np.float64]
) -> torch.Tensor:
    """The first place whose running sum is above the drawn share of the mass."""
    draws_R1 = torch.as_tensor(draws, device=sums_RC.device).unsqueeze(-1)
    # A product that rounds up to the whole mass would point behind the last token.
    points_R1 = torch.minimum((mass_R1.double() * draws_R1).long(), mass_R1 - 1)
    places_R1 = torch.searchsorted(sums_RC, points_R1, right=True)
    return places_R1.squeeze(-1).clamp_(max=sums_RC.shape[-1] - 1)


def _largest(logits_RV: torch.Tensor, size: int) -> torch.Tensor:
    """The ids of the `size` largest logits, largest first, the lower id first among equals.

    Sorted by a key that no two tokens of a row share, so that the result does not depend on how
    `topk` treats equals: the float's bits in an order that integers have, then the id.
    """
    if size == 0:
        return logits_RV.new_empty((len(logits_RV), 0), dtype=torch.int64)
    bits_RV = (logits_RV + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    ordered_RV = (bits_RV >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits_RV)
    ids_V = torch.arange(logits_RV.shape[-1], device=logits_RV.device)
    keys_RV = ordered_RV.long().bitwise_left_shift_(32).sub_(ids_V)
    if size == logits_RV.shape[-1]:
        keys_RC = keys_RV.sort(-1, descending=True).values
    else:
        keys_RC = keys_RV.topk(size, dim=-1).values
    return keys_RC.neg_().bitwise_and_(0xFFFFFFFF)


def _index(values: Ints | _Rows, device: torch.device) -> torch.Tensor:
    return on_device(values, device).long()


def on_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array on a device. Does not wait for a GPU's work: the copy is one of pinned memory, which
    torch reuses only when the copy is done.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _take(tensor: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """The given rows; no copy if that is all of them."""
    return tensor if len(rows) == len(tensor) else tensor[_index(rows, tensor.device)]


def _spread(part: torch.Tensor, places: _Rows, *, rows: int) -> torch.Tensor:
    """Puts rows back into their places among `rows`; the others are 0."""
    whole = part.new_zeros((rows, *part.shape[1:]))
    whole[_index(places, part.device)] = part
    return whole
