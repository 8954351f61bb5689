"""Choosing tokens on the device: what `model.sampler` does, without a wait for the host.

The arithmetic is the sampler's. A token weighs floor(2**40 · exp((logit - largest) / temperature)),
an integer, so sums are exact in any order; one uniform number of Philox, keyed by (seed, choice,
index), picks a share of the sum. Rows go three ways, each row by its own columns:

    greedy          the likeliest token, the lowest id among equals: `Tops` has it already
    plain           inverse CDF in order of ids: sums of chunks, then inside one chunk
    top-k, top-p    inverse CDF likeliest first, without a sort: where a running sum reaches a
                    target is found bit by bit of the logit (`_descend`), a pass a bit

Columns are read from the seats' state (`model.kernels.inputs`). Penalties, biases and log
probabilities are done before and after, by whoever has such rows.

Legend: R rows, V vocabulary, N chunks of a row.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from model.batch import SamplingBatch
from model.kernels.head import Tops, find_tops, merge_tops
from model.kernels.inputs import Column
from model.sampler import sample

_CHUNK = 4096
_CUT_BLOCK = 8192


def choose(
    logits_RV: torch.Tensor,
    state: torch.Tensor,
    seats_R: torch.Tensor,
    *,
    tops: Tops | None = None,
    chunk: int = _CHUNK,
) -> torch.Tensor:
    """One token a row, [R] int32. `logits_RV` is float32 and contiguous.

    `tops` are those of these logits, of any stretches; without them they are found first.
    """
    R, V = logits_RV.shape
    device = logits_RV.device
    tokens_R = torch.empty(R, dtype=torch.int32, device=device)
    if R == 0:
        return tokens_R
    tops = tops or find_tops(logits_RV)
    if tops.values_RN.shape[1] > 1:
        tops = merge_tops(tops, vocab_size=V)
    top_R1, id_R1 = tops.values_RN, tops.ids_RN
    num_chunks = triton.cdiv(V, chunk)
    sums = torch.empty((R, num_chunks), dtype=torch.int64, device=device)
    stride = state.stride(0)
    _sums[(R, num_chunks)](
        logits_RV, state, seats_R, top_R1, sums, V, stride,
        N=num_chunks, CHUNK=chunk, enable_fp_fusion=False,
    )  # fmt: skip
    _pick[(R,)](
        logits_RV, state, seats_R, top_R1, id_R1, sums, tokens_R, V, stride,
        N=num_chunks, CHUNK=chunk, LANES=triton.next_power_of_2(num_chunks),
        enable_fp_fusion=False,
    )  # fmt: skip
    block = min(_CUT_BLOCK, triton.next_power_of_2(V))
    _pick_likeliest[(R,)](
        logits_RV, state, seats_R, top_R1, tokens_R, V, stride,
        BLOCK=block, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return tokens_R


def choose_twin(
    logits_RV: torch.Tensor,
    state: torch.Tensor,
    seats_R: torch.Tensor,
    *,
    tops: Tops | None = None,  # noqa: ARG001 - the signature of `choose`
    chunk: int = _CHUNK,  # noqa: ARG001
) -> torch.Tensor:
    """The same by the sampler itself, on the host."""
    own = state[seats_R.long()].cpu().numpy()
    halves = own[:, [Column.SEED_LOW, Column.SEED_HIGH]].astype(np.uint32).astype(np.uint64)
    floats = own.view(np.float32)
    none, zeros = np.zeros(0, np.int32), np.zeros(len(own), np.float32)
    columns = SamplingBatch(
        seeds_R=halves[:, 0] | halves[:, 1] << np.uint64(32),
        choices_R=own[:, Column.CHOICE],
        indices_R=own[:, Column.INDEX],
        temperatures_R=floats[:, Column.TEMPERATURE],
        top_ks_R=own[:, Column.TOP_K],
        top_ps_R=floats[:, Column.TOP_P],
        min_ps_R=floats[:, Column.MIN_P],
        presence_R=zeros,
        frequency_R=zeros,
        repetition_R=zeros + 1,
        penalty_rows_P=none,
        penalty_ids_P=none,
        penalty_counts_P=none,
        bias_rows_E=none,
        bias_ids_E=none,
        bias_values_E=np.zeros(0, np.float32),
        wants_logprobs_R=zeros > 0,
        num_top=0,
    )
    return sample(logits_RV.cpu(), columns).tokens_R.int().to(logits_RV.device)


@triton.jit
def _weigh(logits, largest, temperature, least):
    """Integer weights; those under `least` (min-p's share of the likeliest) are 0."""
    scaled = tl.exp((logits - largest) / temperature) * 1099511627776.0
    weights = scaled.to(tl.int64)
    return tl.where(weights >= least, weights, 0)


@triton.jit
def _least(own):
    min_p = tl.load(own + 9).to(tl.float32, bitcast=True).to(tl.float64)
    return tl.math.ceil(min_p * 1099511627776.0).to(tl.int64)


@triton.jit
def _uniform(own):
    """A number in [0, 1) of 53 bits: Philox4x32-10, as in `model.philox`."""
    mask32 = tl.full((), 0xFFFFFFFF, tl.uint64)
    index = tl.load(own + 2).to(tl.uint64) & mask32
    key0 = tl.load(own + 3).to(tl.uint64) & mask32
    key1 = tl.load(own + 4).to(tl.uint64) & mask32
    c2 = tl.load(own + 5).to(tl.uint64) & mask32
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
def _point(mass, own):
    """The drawn share of the mass: from 0 to mass - 1."""
    drawn = (mass.to(tl.float64) * _uniform(own)).to(tl.int64)
    return tl.minimum(drawn, mass - 1)


@triton.jit
def _sums(
    logits_ptr,
    state_ptr,
    seats_ptr,
    top_ptr,
    sums_ptr,
    V,
    stride,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Weight of each chunk, for rows that are not greedy."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    own = state_ptr + tl.load(seats_ptr + row) * stride
    temperature = tl.load(own + 6).to(tl.float32, bitcast=True)
    if temperature == 0.0:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf"))
    weights = _weigh(logits, tl.load(top_ptr + row), temperature, _least(own))
    tl.store(sums_ptr + row * N + chunk, tl.sum(weights, axis=0))


@triton.jit
def _pick(
    logits_ptr,
    state_ptr,
    seats_ptr,
    top_ptr,
    id_ptr,
    sums_ptr,
    tokens_ptr,
    V,
    stride,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Greedy rows, and plain ones: the chunk where the point lies, then the place in it."""
    row = tl.program_id(0).to(tl.int64)
    own = state_ptr + tl.load(seats_ptr + row) * stride
    temperature = tl.load(own + 6).to(tl.float32, bitcast=True)
    if temperature == 0.0:
        tl.store(tokens_ptr + row, tl.load(id_ptr + row))
        return
    lanes = tl.arange(0, LANES)
    sums = tl.load(sums_ptr + row * N + lanes, mask=lanes < N, other=0)
    running = tl.cumsum(sums, axis=0)
    point = _point(tl.sum(sums, axis=0), own)
    chunk = tl.sum((running <= point).to(tl.int32), axis=0)
    before = tl.sum(tl.where(lanes == chunk, running - sums, 0), axis=0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf"))
    weights = _weigh(logits, tl.load(top_ptr + row), temperature, _least(own))
    place = tl.sum((tl.cumsum(weights, axis=0) <= point - before).to(tl.int32), axis=0)
    tl.store(tokens_ptr + row, tl.minimum(chunk * CHUNK + place, V - 1))


@triton.jit
def _keys(logits):
    """Integers from 0 to 2**32 - 1 in the order of the floats; minus zero equals zero."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    ordered = ((bits >> 31) & 0x7FFFFFFF) ^ bits
    return ordered.to(tl.int64) + 2147483648


@triton.jit
def _measure(
    row_ptr, V, key, largest, temperature, least, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """How many tokens are at or above a key, or what they weigh together."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + ids, mask=ids < V, other=float("-inf"))
        inside = (_keys(logits) >= key) & (ids < V)
        if COUNT:
            total += inside.to(tl.int64)
        else:
            total += tl.where(inside, _weigh(logits, largest, temperature, least), 0)
    return tl.sum(total, axis=0)


@triton.jit
def _descend(
    row_ptr, V, target, largest, temperature, least, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """The shortest run of tokens, likeliest first, that measures at least `target` (>= 1).

    Returns the key of its last token, how many tokens above that key there are by this measure, and
    which of the tokens with that key is the last (from 0).
    """
    key = tl.full((), 0, tl.int64)
    bit = tl.full((), 2147483648, tl.int64)
    for _ in range(32):
        raised = key + bit
        reached = _measure(row_ptr, V, raised, largest, temperature, least, COUNT, BLOCK)
        key = tl.where(reached >= target, raised, key)
        bit = bit >> 1
    above = _measure(row_ptr, V, key + 1, largest, temperature, least, COUNT, BLOCK)
    if COUNT:
        each = tl.full((), 1, tl.int64)
    else:
        each = tl.maximum(_weight_of(key, largest, temperature, least), 1)
    place = (target - above + each - 1) // each - 1
    return key, above, place


@triton.jit
def _weight_of(key, largest, temperature, least):
    ordered = (key - 2147483648).to(tl.int32)
    bits = ((ordered >> 31) & 0x7FFFFFFF) ^ ordered
    return _weigh(bits.to(tl.float32, bitcast=True), largest, temperature, least)


@triton.jit
def _mass_to(
    row_ptr, V, target, largest, temperature, least, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """The weight of the run that `_descend` finds."""
    key, above, place = _descend(row_ptr, V, target, largest, temperature, least, COUNT, BLOCK)
    if COUNT:
        above = _measure(row_ptr, V, key + 1, largest, temperature, least, False, BLOCK)
    return above + (place + 1) * _weight_of(key, largest, temperature, least)


@triton.jit
def _pick_likeliest(
    logits_ptr,
    state_ptr,
    seats_ptr,
    top_ptr,
    tokens_ptr,
    V,
    stride,
    BLOCK: tl.constexpr,
):
    """Rows with top-k or top-p: both cuts give a mass, a share of it is drawn, the token found."""
    row = tl.program_id(0).to(tl.int64)
    own = state_ptr + tl.load(seats_ptr + row) * stride
    temperature = tl.load(own + 6).to(tl.float32, bitcast=True)
    top_k = tl.load(own + 7)
    top_p = tl.load(own + 8).to(tl.float32, bitcast=True)
    if temperature == 0.0:
        return
    if (top_k >= V) & (top_p >= 1.0):
        return
    row_ptr = logits_ptr + row * V
    largest = tl.load(top_ptr + row)
    least = _least(own)
    mass = tl.full((), 0, tl.int64)
    if top_k < V:
        mass = _mass_to(row_ptr, V, top_k.to(tl.int64), largest, temperature, least, True, BLOCK)
    else:
        lowest = tl.full((), 0, tl.int64)
        mass = _measure(row_ptr, V, lowest, largest, temperature, least, False, BLOCK)
    if top_p < 1.0:
        wanted = tl.math.ceil(mass.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
        wanted = tl.maximum(wanted, 1)
        nucleus = _mass_to(row_ptr, V, wanted, largest, temperature, least, False, BLOCK)
        mass = tl.minimum(nucleus, mass)
    target = _point(mass, own) + 1
    key, _above, place = _descend(row_ptr, V, target, largest, temperature, least, False, BLOCK)
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
