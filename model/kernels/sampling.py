"""Sampling tokens on the device: what `model.sampler` does, without waiting for the host.

The arithmetic is the sampler's. A token weighs floor(2**40 · exp((logit - largest) / temperature)),
an integer, so sums are exact in any order; one uniform number of Philox, keyed by (seed, choice,
index), selects a share of the sum. Rows take one of three paths, each row by its entry columns:

    greedy          the argmax, the lowest id among equals: `Argmax` has it already
    plain           inverse CDF in order of ids: sums of chunks, then inside one chunk
    top-k, top-p    inverse CDF by falling logit, without a sort: the logit at which a running sum
                    reaches a target is found by three histograms (`_descend`), one per digit

Columns are read from the state of the batch slots (`model.kernels.inputs`). Penalties, biases and
log probabilities are applied before and after, by the runner.

Legend: R rows, V vocabulary, N chunks of a row; `entry`: a batch slot's row of the state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels.head import Argmax, find_argmax, merge_argmax
from model.kernels.inputs import (
    CHOICE,
    INDEX,
    MIN_P,
    SEED_HIGH,
    SEED_LOW,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)

_CHUNK = 4096
_CUT_BLOCK = 8192
_BINS = 2048  # of a histogram: a digit of 11 bits
_ONE = tl.constexpr(2.0**40)  # weight of the largest logit, as in `model.sampler`


def sample_tokens(
    logits_RV: torch.Tensor,
    state: torch.Tensor,
    batch_slots_R: torch.Tensor,
    *,
    argmax: Argmax | None = None,
    chunk: int = _CHUNK,
) -> torch.Tensor:
    """One token per row, [R] int32. `logits_RV` is float32 and contiguous.

    `argmax` is that of these logits, in any chunks; without it, it is found first.
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
    _sample_plain[(R,)](
        logits_RV, state, batch_slots_R, largest_R1, id_R1, sums, tokens_R, V, stride,
        N=num_chunks, CHUNK=chunk, LANES=triton.next_power_of_2(num_chunks),
        enable_fp_fusion=False,
    )  # fmt: skip
    histograms = torch.empty((R, _BINS), dtype=torch.int64, device=device)
    _sample_cut[(R,)](
        logits_RV, state, batch_slots_R, largest_R1, sums, histograms, tokens_R, V, stride,
        N=num_chunks, LANES=triton.next_power_of_2(num_chunks),
        BLOCK=min(_CUT_BLOCK, triton.next_power_of_2(V)), BINS=_BINS, num_warps=16,
        enable_fp_fusion=False,
    )  # fmt: skip
    return tokens_R


@triton.jit
def _weigh(logits, largest, temperature, least):
    """Integer weights; those under `least` (min-p's share of the largest) are 0."""
    scaled = tl.exp((logits - largest) / temperature) * _ONE
    weights = scaled.to(tl.int64)
    return tl.where(weights >= least, weights, 0)


@triton.jit
def _least(entry):
    """The weight below which min-p drops a token."""
    min_p = tl.load(entry + MIN_P).to(tl.float32, bitcast=True).to(tl.float64)
    return tl.math.ceil(min_p * _ONE).to(tl.int64)


@triton.jit
def _uniform(entry):
    """A number in [0, 1) of 53 bits: Philox4x32-10, as in `model.philox`."""
    mask32 = tl.full((), 0xFFFFFFFF, tl.uint64)
    index = tl.load(entry + INDEX).to(tl.uint64) & mask32
    key0 = tl.load(entry + SEED_LOW).to(tl.uint64) & mask32
    key1 = tl.load(entry + SEED_HIGH).to(tl.uint64) & mask32
    c2 = tl.load(entry + CHOICE).to(tl.uint64) & mask32
    c0 = index
    c1 = tl.full((), 0, tl.uint64)
    c3 = tl.full((), 0, tl.uint64)
    for _ in range(10):
        product0 = c0 * tl.full((), 0xD2511F53, tl.uint64)
        product1 = c2 * tl.full((), 0xCD9E8D57, tl.uint64)
        c0 = (product1 >> 32) ^ c1 ^ key0
        c2 = (product0 >> 32) ^ c3 ^ key1
        c1 = product1 & mask32
        c3 = product0 & mask32
        key0 = (key0 + 0x9E3779B9) & mask32
        key1 = (key1 + 0xBB67AE85) & mask32
    high = (c0 >> 5).to(tl.float64)
    low = (c1 >> 6).to(tl.float64)
    return (high * 67108864.0 + low) * 1.1102230246251565e-16


@triton.jit
def _point(mass, entry):
    """The drawn point of the mass: from 0 to mass - 1."""
    drawn = (mass.to(tl.float64) * _uniform(entry)).to(tl.int64)
    return tl.minimum(drawn, mass - 1)


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
    weights = _weigh(logits, tl.load(largest_ptr + row), temperature, _least(entry))
    tl.store(sums_ptr + row * N + chunk, tl.sum(weights, axis=0))


@triton.jit(do_not_specialize_on_alignment=["batch_slots_ptr"])
def _sample_plain(
    logits_ptr,  # [R, V]
    state_ptr,  # [batch slots, columns]
    batch_slots_ptr,  # [R]
    largest_ptr,  # [R]
    id_ptr,  # [R]
    sums_ptr,  # [R, N]
    tokens_ptr,  # [R]
    V,
    stride,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Samples greedy rows, and plain ones: finds the chunk of the point, then the token."""
    row = tl.program_id(0).to(tl.int64)
    entry = state_ptr + tl.load(batch_slots_ptr + row) * stride
    temperature = tl.load(entry + TEMPERATURE).to(tl.float32, bitcast=True)
    if temperature == 0.0:
        tl.store(tokens_ptr + row, tl.load(id_ptr + row))
        return
    lanes = tl.arange(0, LANES)
    sums = tl.load(sums_ptr + row * N + lanes, mask=lanes < N, other=0)
    running = tl.cumsum(sums, axis=0)
    point = _point(tl.sum(sums, axis=0), entry)
    chunk = tl.sum((running <= point).to(tl.int32), axis=0)
    before = tl.sum(tl.where(lanes == chunk, running - sums, 0), axis=0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf"))
    weights = _weigh(logits, tl.load(largest_ptr + row), temperature, _least(entry))
    place = tl.sum((tl.cumsum(weights, axis=0) <= point - before).to(tl.int32), axis=0)
    tl.store(tokens_ptr + row, tl.minimum(chunk * CHUNK + place, V - 1))


@triton.jit
def _keys(logits):
    """Integers from 0 to 2**32 - 1 in the order of the floats; minus zero equals zero."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    ordered = ((bits >> 31) & 0x7FFFFFFF) ^ bits
    return ordered.to(tl.int64) + 2147483648


@triton.jit
def _weight_above(row_ptr, V, key, largest, temperature, least, BLOCK: tl.constexpr):
    """What the tokens above this key weigh together."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + ids, mask=ids < V, other=float("-inf"))
        weights = _weigh(logits, largest, temperature, least)
        total += tl.where(_keys(logits) > key, weights, 0)
    return tl.sum(total, axis=0)


@triton.jit
def _descend(
    row_ptr,
    bins_ptr,  # [BINS], zeros, and left so
    V,
    target,
    floor,
    largest,
    temperature,
    least,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """The shortest run of tokens, largest logit first, that measures at least `target` (>= 1).

    A run measures the number of its tokens, or their weight; only those that weigh more than
    `floor` count; if all of these measure less, the run is all. Returns the key of the last token,
    what the tokens above that key measure, and which of the tokens with that key is the last (from
    0).
    """
    bins = tl.arange(0, BINS)
    prefix = tl.full((), 0, tl.int64)
    above = tl.full((), 0, tl.int64)
    for digit in range(3):  # of 10, 11 and 11 bits
        shift = 22 - 11 * digit
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + ids, mask=ids < V, other=float("-inf"))
            keys = _keys(logits)
            weights = _weigh(logits, largest, temperature, least)
            inside = (ids < V) & (weights > floor) & (keys >> (shift + 11) == prefix)
            amounts = tl.where(inside, 1, 0).to(tl.int64) if COUNT else weights
            places = bins_ptr + ((keys >> shift) & (BINS - 1))
            tl.atomic_add(places, amounts, mask=inside, sem="relaxed")
        tl.debug_barrier()
        sums = tl.atomic_xchg(bins_ptr + bins, tl.zeros((BINS,), tl.int64), sem="relaxed")
        tl.debug_barrier()
        if digit == 0:
            target = tl.minimum(target, tl.sum(sums, axis=0))
        to_end = above + tl.sum(sums, axis=0) - tl.cumsum(sums, axis=0) + sums
        last = tl.max(tl.where(to_end >= target, bins, 0), axis=0)
        above += tl.sum(tl.where(bins > last, sums, 0), axis=0)
        prefix = (prefix << 11) + last
    if COUNT:
        each = tl.full((), 1, tl.int64)
    else:
        each = tl.maximum(_weight_of(prefix, largest, temperature, least), 1)
    return prefix, above, (target - above + each - 1) // each - 1


@triton.jit
def _weight_of(key, largest, temperature, least):
    ordered = (key - 2147483648).to(tl.int32)
    bits = ((ordered >> 31) & 0x7FFFFFFF) ^ ordered
    return _weigh(bits.to(tl.float32, bitcast=True), largest, temperature, least)


@triton.jit
def _floor(total, target, V):
    """A weight: all tokens of at most it weigh no more than what a run of `target` leaves."""
    return tl.maximum(total - target, 0) // V


@triton.jit(do_not_specialize_on_alignment=["batch_slots_ptr"])
def _sample_cut(
    logits_ptr,  # [R, V]
    state_ptr,  # [batch slots, columns]
    batch_slots_ptr,  # [R]
    largest_ptr,  # [R]
    sums_ptr,  # [R, N]
    histograms_ptr,  # [R, BINS]
    tokens_ptr,  # [R]
    V,
    stride,
    N: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Samples rows with top-k or top-p: both cuts give a mass, in which a point is drawn."""
    row = tl.program_id(0).to(tl.int64)
    entry = state_ptr + tl.load(batch_slots_ptr + row) * stride
    temperature = tl.load(entry + TEMPERATURE).to(tl.float32, bitcast=True)
    top_k = tl.load(entry + TOP_K)
    top_p = tl.load(entry + TOP_P).to(tl.float32, bitcast=True)
    if temperature == 0.0:
        return
    if (top_k >= V) & (top_p >= 1.0):
        return
    row_ptr = logits_ptr + row * V
    largest = tl.load(largest_ptr + row)
    least = _least(entry)
    lanes = tl.arange(0, LANES)
    total = tl.sum(tl.load(sums_ptr + row * N + lanes, mask=lanes < N, other=0), axis=0)
    bins_ptr = histograms_ptr + row * BINS
    tl.store(bins_ptr + tl.arange(0, BINS), tl.zeros((BINS,), tl.int64))
    tl.debug_barrier()
    mass = total
    if top_k < V:
        # Tokens without weight add nothing to the mass, so that they need not be counted.
        key, above, place = _descend(
            row_ptr, bins_ptr, V, top_k.to(tl.int64), 0, largest, temperature, least,
            True, BLOCK, BINS,
        )  # fmt: skip
        mass = _weight_above(row_ptr, V, key, largest, temperature, least, BLOCK)
        mass = tl.minimum(mass + (place + 1) * _weight_of(key, largest, temperature, least), total)
    if top_p < 1.0:
        wanted = tl.math.ceil(mass.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
        wanted = tl.maximum(wanted, 1)
        key, above, place = _descend(
            row_ptr, bins_ptr, V, wanted, _floor(total, wanted, V), largest, temperature, least,
            False, BLOCK, BINS,
        )  # fmt: skip
        nucleus = above + (place + 1) * _weight_of(key, largest, temperature, least)
        mass = tl.minimum(nucleus, mass)
    target = _point(mass, entry) + 1
    key, _above, place = _descend(
        row_ptr, bins_ptr, V, target, _floor(total, target, V), largest, temperature, least,
        False, BLOCK, BINS,
    )  # fmt: skip
    seen = tl.full((), 0, tl.int64)
    token = tl.full((), 0, tl.int32)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + ids, mask=ids < V, other=float("-inf"))
        same = ((_keys(logits) == key) & (ids < V)).to(tl.int64)
        order = seen + tl.cumsum(same, axis=0) - 1
        token += tl.sum(tl.where((same > 0) & (order == place), ids, 0), axis=0)
        seen += tl.sum(same, axis=0)
    tl.store(tokens_ptr + row, token)
