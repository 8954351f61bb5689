"""Sampling tokens on the device: what `model.sampler` does, without waiting for the host.

The arithmetic is the sampler's. Tokens have integer weights (`model.kernels.weights`), so sums are
exact in any order; one uniform number of Philox, keyed by (seed, choice, index), selects a share of
the sum. Rows take one of three paths, each row by its entry columns:

    greedy          the argmax, the lowest id among equals: `Argmax` has it already
    plain           inverse CDF in order of ids: sums of chunks, then inside one chunk
    top-k, top-p    inverse CDF by falling logit (`model.kernels.cuts`)

Columns are read from the state of the batch slots (`model.kernels.inputs`). Penalties, biases and
log probabilities are applied before and after, by the runner.

Legend: R rows, V vocabulary, N chunks of a row; `entry`: a batch slot's row of the state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels.cuts import (
    BINS,
    COLUMNS,
    NO_STAGE,
    PROGRAMS,
    STAGE,
    Searches,
    begin_search,
    sample_cut,
)
from model.kernels.head import Argmax, find_argmax, merge_argmax
from model.kernels.inputs import TEMPERATURE
from model.kernels.weights import least_weight, point, weigh

_CHUNK = 4096


def sample_tokens(
    logits_RV: torch.Tensor,
    state: torch.Tensor,
    batch_slots_R: torch.Tensor,
    *,
    argmax: Argmax | None = None,
    chunk: int = _CHUNK,
    programs: int = PROGRAMS,
) -> torch.Tensor:
    """One token per row, [R] int32. `logits_RV` is float32 and contiguous.

    `argmax` is that of these logits, in any chunks; without it, it is found first.
    `chunk` tokens are read at a time; `programs` share the rows. Both affect speed and no token.
    """
    R, V = logits_RV.shape
    device = logits_RV.device
    tokens_R = torch.empty(R, dtype=torch.int32, device=device)
    if R == 0:
        return tokens_R
    argmax = argmax or find_argmax(logits_RV)
    if argmax.values_RN.shape[1] > 1:
        argmax = merge_argmax(argmax, vocab_size=V)
    largest_R1, id_R1 = argmax.values_RN, argmax.ids_RN
    num_chunks = triton.cdiv(V, chunk)
    sums = torch.empty((R, num_chunks), dtype=torch.int64, device=device)
    stride = state.stride(0)
    _sums[(R, num_chunks)](
        logits_RV, state, batch_slots_R, largest_R1, sums, V, stride,
        N=num_chunks, CHUNK=chunk, enable_fp_fusion=False,
    )  # fmt: skip
    searches = Searches(R, device=device)
    _sample_plain[(R,)](
        logits_RV, state, batch_slots_R, largest_R1, id_R1, sums, searches.search, searches.bins,
        tokens_R, V, stride, N=num_chunks, CHUNK=chunk, LANES=triton.next_power_of_2(num_chunks),
        enable_fp_fusion=False,
    )  # fmt: skip
    sample_cut(
        logits_RV, state, batch_slots_R, largest_R1, searches, tokens_R,
        chunk=chunk, programs=programs,
    )  # fmt: skip
    return tokens_R


@triton.jit(do_not_specialize_on_alignment=["batch_slots_ptr"])
def _sums(
    logits_ptr,  # [R, V]
    state_ptr,  # [batch slots, columns]
    batch_slots_ptr,  # [R]
    largest_ptr,  # [R]
    sums_ptr,  # [R, N]
    V,
    stride,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Weight of each chunk, for rows that are not greedy."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    entry = state_ptr + tl.load(batch_slots_ptr + row) * stride
    temperature = tl.load(entry + TEMPERATURE).to(tl.float32, bitcast=True)
    if temperature == 0.0:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf"))
    weights = weigh(logits, tl.load(largest_ptr + row), temperature, least_weight(entry))
    tl.store(sums_ptr + row * N + chunk, tl.sum(weights, axis=0))


@triton.jit(do_not_specialize_on_alignment=["batch_slots_ptr"])
def _sample_plain(
    logits_ptr,  # [R, V]
    state_ptr,  # [batch slots, columns]
    batch_slots_ptr,  # [R]
    largest_ptr,  # [R]
    id_ptr,  # [R]
    sums_ptr,  # [R, N]
    search_ptr,  # [R, 9]
    bins_ptr,  # [R, 4, BINS]
    tokens_ptr,  # [R]
    V,
    stride,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Samples greedy rows and plain ones (finds the chunk of the point, then the token).

    Begins the search of those with a cut.
    """
    row = tl.program_id(0).to(tl.int64)
    entry = state_ptr + tl.load(batch_slots_ptr + row) * stride
    temperature = tl.load(entry + TEMPERATURE).to(tl.float32, bitcast=True)
    if temperature == 0.0:
        tl.store(tokens_ptr + row, tl.load(id_ptr + row))
        tl.store(search_ptr + row * COLUMNS + STAGE, NO_STAGE)
        return
    lanes = tl.arange(0, LANES)
    sums = tl.load(sums_ptr + row * N + lanes, mask=lanes < N, other=0)
    total = tl.sum(sums, axis=0)
    if begin_search(search_ptr + row * COLUMNS, bins_ptr + row * 4 * BINS, entry, total, V):
        return
    running = tl.cumsum(sums, axis=0)
    drawn = point(total, entry)
    chunk = tl.sum((running <= drawn).to(tl.int32), axis=0)
    before = tl.sum(tl.where(lanes == chunk, running - sums, 0), axis=0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf"))
    weights = weigh(logits, tl.load(largest_ptr + row), temperature, least_weight(entry))
    place = tl.sum((tl.cumsum(weights, axis=0) <= drawn - before).to(tl.int32), axis=0)
    tl.store(tokens_ptr + row, tl.minimum(chunk * CHUNK + place, V - 1))
