"""Rows with top-k or top-p: the token at the drawn point of what both cuts leave, without a sort.

Tokens stand in falling order of logit. A *search* finds where a run of them, from the first,
reaches a target: a number of tokens (top-k), a share of the weight (top-p), the drawn point. It
reads the row three times, once per digit of the logits' keys, and adds tokens to a histogram of the
digit. Searches share their first digit, so that a row is read at most eight times:

    pass 0        first digit of all searches
    pass 1, 2     second and third digit: top-k
    pass 3, 4     the same: top-p
    pass 5, 6     the same: the drawn point
    `_find`       the token: of those with the key that was found, the right one by id

Several programs share a row. The last that arrives evaluates the histogram and notes which pass the
row needs next; in the others it returns at once. All sums are of integers, so that their order, and
with it the number of programs, affects no bit. Nothing of a row depends on another.

Legend: R rows, V vocabulary, N chunks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels.inputs import TEMPERATURE, TOP_K, TOP_P
from model.kernels.weights import least_weight, point, weigh

PROGRAMS = 264  # two per multiprocessor of the chips this was sized for
_PASSES = 7
# Columns of a search. STAGE: the next pass of the row; MASS: weight that the cuts so far leave.
ARRIVED, STAGE, TOTAL, TARGET, FLOOR, PREFIX, ABOVE, MASS, PLACE, COLUMNS = (
    tl.constexpr(column) for column in range(10)
)
FIND = tl.constexpr(_PASSES)
NO_STAGE = tl.constexpr(_PASSES + 1)
BINS = tl.constexpr(2048)  # of a histogram: a digit of 11 bits; the first has 10


class Searches:
    """What the passes over R rows share.

    search [R, 9]      the columns above
    bins [R, 4, BINS]  numbers of tokens and their weights: by first digit, then by a later one
    """

    def __init__(self, rows: int, *, device: torch.device) -> None:
        self.search = torch.empty((rows, COLUMNS.value), dtype=torch.int64, device=device)
        self.bins = torch.empty((rows, 4, BINS.value), dtype=torch.int64, device=device)


def sample_cut(
    logits_RV: torch.Tensor,
    state: torch.Tensor,
    batch_slots_R: torch.Tensor,
    largest_R1: torch.Tensor,
    searches: Searches,
    tokens_R: torch.Tensor,
    *,
    chunk: int,
    programs: int,
) -> None:
    """Fills `tokens_R` for the rows whose search has begun (`begin_search`).

    `programs`: of a launch, over all rows; it affects speed and no token.
    """
    R, V = logits_RV.shape
    num_chunks = triton.cdiv(V, chunk)
    grid = (R, min(num_chunks, triton.cdiv(programs, R)))
    for number in range(_PASSES):
        _count[grid](
            logits_RV, state, batch_slots_R, largest_R1, searches.search, searches.bins, V,
            state.stride(0), number, CHUNK=chunk, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    counts = torch.empty((R, num_chunks), dtype=torch.int32, device=logits_RV.device)
    _find[grid](
        logits_RV, searches.search, counts, tokens_R, V, N=num_chunks, CHUNK=chunk,
        LANES=triton.next_power_of_2(num_chunks), num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def begin_search(
    search,  # [9]: of one row
    bins_ptr,  # [4, BINS]: of one row
    entry,
    total,
    V,
):
    """Prepares the search of a row whose weight is `total`. Returns whether it has one."""
    top_k = tl.load(entry + TOP_K)
    top_p = tl.load(entry + TOP_P).to(tl.float32, bitcast=True)
    is_cut = (top_k < V) | (top_p < 1.0)
    tl.store(search + STAGE, tl.where(is_cut, 0, NO_STAGE))
    if is_cut:
        # With top-k all tokens that weigh anything are counted: others add nothing to its mass.
        floor = _floor(total, _wanted(total, top_p), V)
        tl.store(search + FLOOR, tl.where(top_k < V, 0, floor))
        tl.store(search + ARRIVED, 0)
        tl.store(search + TOTAL, total)
        tl.store(search + PREFIX, 0)
        tl.store(bins_ptr + tl.arange(0, 4 * BINS), tl.zeros((4 * BINS,), tl.int64))
    return is_cut


@triton.jit(do_not_specialize=["number"], do_not_specialize_on_alignment=["batch_slots_ptr"])
def _count(
    logits_ptr,  # [R, V]
    state_ptr,  # [batch slots, columns]
    batch_slots_ptr,  # [R]
    largest_ptr,  # [R]
    search_ptr,  # [R, 9]
    bins_ptr,  # [R, 4, BINS]
    V,
    stride,
    number,
    CHUNK: tl.constexpr,
):
    """One pass: counts and weighs the tokens with the digits that were found, by the next digit."""
    row = tl.program_id(0).to(tl.int64)
    search = search_ptr + row * COLUMNS
    if tl.load(search + STAGE) != number:
        return
    entry = state_ptr + tl.load(batch_slots_ptr + row) * stride
    temperature = tl.load(entry + TEMPERATURE).to(tl.float32, bitcast=True)
    top_k = tl.load(entry + TOP_K)
    least = least_weight(entry)
    largest = tl.load(largest_ptr + row)
    prefix = tl.load(search + PREFIX)
    floor = tl.load(search + FLOOR)
    first = bins_ptr + row * 4 * BINS
    bins = first + tl.where(number == 0, 0, 2 * BINS)
    shift = tl.where(number == 0, 22, 11 * (number % 2))
    counted = (number == 1) | (number == 2) | ((number == 0) & (top_k < V))
    for start in range(tl.program_id(1) * CHUNK, V, tl.num_programs(1) * CHUNK):
        ids = start + tl.arange(0, CHUNK)
        logits = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf"))
        keys = _keys(logits)
        weights = weigh(logits, largest, temperature, least)
        inside = (ids < V) & (weights > floor) & (keys >> (shift + 11) == prefix)
        places = (keys >> shift) & (BINS - 1)
        tl.atomic_add(bins + BINS + places, weights, mask=inside, sem="relaxed")
        if counted:
            one = tl.full((CHUNK,), 1, tl.int64)
            tl.atomic_add(bins + places, one, mask=inside, sem="relaxed")
    tl.debug_barrier()  # all threads have added before one of them arrives
    if tl.atomic_add(search + ARRIVED, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        tl.store(search + ARRIVED, 0)
        _evaluate(search, first, entry, number, top_k, V, largest, temperature, least)


@triton.jit
def _evaluate(
    search,  # [9]: of one row
    first,  # [4, BINS]: of one row
    entry,
    number,
    top_k,
    V,
    largest,
    temperature,
    least,
):
    """Finds the digit of a pass; after the last one of a search, begins the next search."""
    bins = tl.arange(0, BINS)
    total = tl.load(search + TOTAL)
    target = tl.load(search + TARGET)
    prefix = tl.load(search + PREFIX)
    above = tl.load(search + ABOVE)
    mass = tl.load(search + MASS)
    stage = number + 1
    if number == 0:
        above = tl.full((), 0, tl.int64)
        mass = total
        if top_k < V:
            counts = tl.load(first + bins)
            target = tl.minimum(top_k.to(tl.int64), tl.sum(counts, axis=0))
            prefix, above = _digit(counts, above, target)
            weights = tl.load(first + BINS + bins)
            mass = tl.sum(tl.where(bins > prefix, weights, 0), axis=0)
        else:
            stage = tl.full((), 3, tl.int32)
    else:
        # Read and cleared for the next pass.
        later = first + 2 * BINS + bins
        counts = tl.atomic_xchg(later, tl.zeros((BINS,), tl.int64), sem="relaxed")
        weights = tl.atomic_xchg(later + BINS, tl.zeros((BINS,), tl.int64), sem="relaxed")
        digit, above = _digit(tl.where(number <= 2, counts, weights), above, target)
        prefix = (prefix << 11) + digit
        if number <= 2:
            mass += tl.sum(tl.where(bins > digit, weights, 0), axis=0)
        if number % 2 == 0:  # the key of the last token is whole
            weight = _weight_of(prefix, largest, temperature, least)
            if number == 2:
                mass = tl.minimum(mass + (target - above) * weight, total)
            weight = tl.maximum(weight, 1)
            run = (target - above + weight - 1) // weight  # tokens with the last key
            if number == 4:
                mass = tl.minimum(above + run * weight, mass)
            tl.store(search + PLACE, run - 1)
    if stage == 3:
        top_p = tl.load(entry + TOP_P).to(tl.float32, bitcast=True)
        target = _wanted(mass, top_p)
        if top_p >= 1.0:
            stage = tl.full((), 5, tl.int32)
    if stage == 5:
        target = point(mass, entry) + 1
    if (stage == 3) | (stage == 5):
        weights = tl.load(first + BINS + bins)
        prefix, above = _digit(weights, tl.full((), 0, tl.int64), target)
        tl.store(search + FLOOR, _floor(total, target, V))
    tl.store(search + STAGE, stage)
    tl.store(search + TARGET, target)
    tl.store(search + PREFIX, prefix)
    tl.store(search + ABOVE, above)
    tl.store(search + MASS, mass)


@triton.jit
def _digit(sums, above, target):
    """The bin in which a run ends that measures `target`, and what precedes this bin measures.

    `above` is what precedes the histogram. The largest bin comes first.
    """
    bins = tl.arange(0, BINS)
    to_end = above + tl.sum(sums, axis=0) - tl.cumsum(sums, axis=0) + sums
    last = tl.max(tl.where(to_end >= target, bins, 0), axis=0)
    return last.to(tl.int64), above + tl.sum(tl.where(bins > last, sums, 0), axis=0)


@triton.jit
def _find(
    logits_ptr,  # [R, V]
    search_ptr,  # [R, 9]
    counts_ptr,  # [R, N]
    tokens_ptr,  # [R]
    V,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Of the tokens with the last key of a search, the one at its place, in order of ids."""
    row = tl.program_id(0).to(tl.int64)
    search = search_ptr + row * COLUMNS
    if tl.load(search + STAGE) != FIND:
        return
    key = tl.load(search + PREFIX)
    row_ptr = logits_ptr + row * V
    for chunk in range(tl.program_id(1), N, tl.num_programs(1)):
        same = _has_key(row_ptr, chunk, key, V, CHUNK)
        tl.store(counts_ptr + row * N + chunk, tl.sum(same, axis=0))
    tl.debug_barrier()  # all threads have stored before one of them arrives
    if tl.atomic_add(search + ARRIVED, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        place = tl.load(search + PLACE)
        lanes = tl.arange(0, LANES)
        counts = tl.load(counts_ptr + row * N + lanes, mask=lanes < N, other=0)
        running = tl.cumsum(counts, axis=0)
        chunk = tl.sum((running <= place).to(tl.int32), axis=0)
        before = tl.sum(tl.where(lanes == chunk, running - counts, 0), axis=0)
        same = _has_key(row_ptr, chunk, key, V, CHUNK)
        at_place = (same > 0) & (before + tl.cumsum(same, axis=0) - 1 == place)
        token = tl.sum(tl.where(at_place, chunk * CHUNK + tl.arange(0, CHUNK), 0), axis=0)
        tl.store(tokens_ptr + row, token)


@triton.jit
def _has_key(row_ptr, chunk, key, V, CHUNK: tl.constexpr):
    """1 for each token of a chunk that has this key, else 0."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(row_ptr + ids, mask=ids < V, other=float("-inf"))
    return ((_keys(logits) == key) & (ids < V)).to(tl.int32)


@triton.jit
def _keys(logits):
    """Integers from 0 to 2**32 - 1 in the order of the floats; minus zero equals zero."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    ordered = ((bits >> 31) & 0x7FFFFFFF) ^ bits
    return ordered.to(tl.int64) + 2147483648


@triton.jit
def _weight_of(key, largest, temperature, least):
    ordered = (key - 2147483648).to(tl.int32)
    bits = ((ordered >> 31) & 0x7FFFFFFF) ^ ordered
    return weigh(bits.to(tl.float32, bitcast=True), largest, temperature, least)


@triton.jit
def _wanted(mass, top_p):
    """The weight that top-p keeps, at least."""
    wanted = tl.math.ceil(mass.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
    return tl.maximum(wanted, 1)


@triton.jit
def _floor(total, target, V):
    """A weight: all tokens of at most it weigh no more than what a run of `target` leaves."""
    return tl.maximum(total - target, 0) // V
