"""Low-rank adapters beside a product: y += B A x, each row with the A and B of its own adapter.

    x [M, K] -- shrink -- A x, parts of K [P, M, R] -- expand -- y, in place

The adapters of one weight are stacked, in ranks padded with zeros. A program computes a tile of
rows for one adapter after another, and stores only the rows that have it: rows that share an
adapter share its loads, in any order of rows. Each row is one sum in the same order whatever other
rows, tiles and adapters there are. Rows without an adapter are neither read nor written, and a step
of such rows alone ends with the check for them.

y may still be in parts (`Product`). A row with an adapter is then added up and rounded as its
reader would; the other parts of it become -0, which changes no sum. So both kinds of product get
the same bits. Legend: M rows, N outputs, K inputs, P parts, R padded rank, L stacked adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from model.adapters import Adapter, Factors
from model.kernels.matmul import Product, load_sum
from model.kernels.tiling import INPUTS

RANKS = 16  # of one tile, the same in every tiling; a stack is padded to whole tiles
_PART = 1024  # inputs per part, at least: enough programs for few rows to stream A
_MAX_PARTS = 8
_FEW = 32  # rows; the layout of products changes here, too, so the warm-up launches both kinds
_MIXED = 256  # rows that may all have different adapters: more are mostly prompts
_LANES = 8  # programs of a tile then, which share the adapters


@dataclass(frozen=True, slots=True)
class AdapterStack:
    """What adapters add to one weight [N, K]."""

    a_LRK: torch.Tensor
    b_LNR: torch.Tensor
    places: torch.Tensor  # number of an adapter -> its place in the stack, from 1; 0: none


def stack_adapters(
    adapters: Sequence[Adapter], *, dtype: torch.dtype, device: torch.device
) -> dict[str, AdapterStack]:
    """The stacks by the network's name of the weight. Adapters are numbered from 1."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.factors)
    return {
        name: _stack([each.factors.get(name) for each in adapters], dtype=dtype, device=device)
        for name in names
    }


def _stack(
    factors: Sequence[Factors | None], *, dtype: torch.dtype, device: torch.device
) -> AdapterStack:
    present = [each for each in factors if each is not None]
    rank = triton.cdiv(max(len(each.a) for each in present), RANKS) * RANKS
    a = [pad(torch.from_numpy(f.a).to(dtype), (0, 0, 0, rank - len(f.a))) for f in present]
    b = [pad(torch.from_numpy(f.b).to(dtype), (0, rank - len(f.a))) for f in present]
    counts = torch.tensor([0, *(each is not None for each in factors)]).cumsum(0)
    changed = torch.tensor([False, *(each is not None for each in factors)])
    places = torch.where(changed, counts, 0).int()
    return AdapterStack(torch.stack(a).to(device), torch.stack(b).to(device), places.to(device))


def add_adapters(
    y: Product, x_MK: torch.Tensor, stack: AdapterStack, adapters_M: torch.Tensor
) -> None:
    """Adds to a product of x, in place, what the adapter of each row gives (0: none)."""
    L, N, R = stack.b_LNR.shape
    M, K = x_MK.shape
    if M == 0:
        return
    part = triton.cdiv(triton.cdiv(K, min(_MAX_PARTS, triton.cdiv(K, _PART))), INPUTS) * INPUTS
    parts = triton.cdiv(K, part)
    wide = 128 if y.num_parts == 1 else 64  # parts are added up in registers
    rows, outputs, warps = (16, 64, 4) if M <= _FEW else (64, wide, 8)
    tiles, lanes = triton.cdiv(M, rows), min(L, _LANES) if M <= _MIXED else 1
    low_PMR = torch.empty((parts, M, R), dtype=torch.float32, device=x_MK.device)
    _shrink[(tiles, parts * R // RANKS, lanes)](
        x_MK, stack.a_LRK, stack.places, adapters_M, low_PMR, M, L,
        K=K, R=R, PART=part, ROWS=rows, INPUTS=INPUTS, RANKS=RANKS,
        num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    _expand[(tiles, triton.cdiv(N, outputs), lanes)](
        low_PMR, stack.b_LNR, stack.places, adapters_M, y.values, M, L,
        N=N, R=R, LOW_PARTS=parts, PARTS=y.num_parts, ROWS=rows, OUTPUTS=outputs, RANKS=RANKS,
        num_warps=warps, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _places_of(adapters_ptr, places_ptr, rows, M):
    """The place in the stack of each row's adapter, from 1; 0: none."""
    return tl.load(places_ptr + tl.load(adapters_ptr + rows, mask=rows < M, other=0))


@triton.jit(do_not_specialize=["M", "L"], do_not_specialize_on_alignment=["adapters_ptr"])
def _shrink(
    x_ptr,  # [M, K]
    a_ptr,  # [L, R, K]
    places_ptr,  # [adapters + 1]
    adapters_ptr,  # [M]
    low_ptr,  # [P, M, R]
    M,
    L,
    K: tl.constexpr,
    R: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """A tile of A x over one part of K, for each adapter of its rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1) // (R // RANKS)
    ranks = tl.program_id(1) % (R // RANKS) * RANKS + tl.arange(0, RANKS)
    places = _places_of(adapters_ptr, places_ptr, rows, M)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * K
    low_rows = low_ptr + (part.to(tl.int64) * M + rows)[:, None] * R
    for place in range(tl.program_id(2) + 1, L + 1, tl.num_programs(2)):
        mine = places == place
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            a_ranks = a_ptr + ((place - 1) * R + ranks).to(tl.int64)[:, None] * K
            chain = tl.zeros((RANKS, ROWS), tl.float32)
            for tile in range(PART // INPUTS):
                inputs = part * PART + tile * INPUTS + tl.arange(0, INPUTS)[None, :]
                a = tl.load(a_ranks + inputs, mask=inputs < K, other=0.0)
                x = tl.load(x_rows + inputs, mask=mine[:, None] & (inputs < K), other=0.0)
                chain = tl.dot(a, tl.trans(x), chain, input_precision="ieee")
            tl.store(low_rows + ranks[None, :], tl.trans(chain), mask=mine[:, None])


@triton.jit(do_not_specialize=["M", "L"], do_not_specialize_on_alignment=["adapters_ptr"])
def _expand(
    low_ptr,  # [P, M, R]
    b_ptr,  # [L, N, R]
    places_ptr,  # [adapters + 1]
    adapters_ptr,  # [M]
    y_ptr,  # [M, N], or [PARTS, M, N]
    M,
    L,
    N: tl.constexpr,
    R: tl.constexpr,
    LOW_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """A tile of y, for each adapter of its rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    places = _places_of(adapters_ptr, places_ptr, rows, M)
    dtype = b_ptr.dtype.element_ty
    low_rows = low_ptr + rows.to(tl.int64)[None, :] * R
    offsets = rows.to(tl.int64)[:, None] * N + outputs[None, :]
    low_stride = M.to(tl.int64) * R
    part_stride = M.to(tl.int64) * N
    for place in range(tl.program_id(2) + 1, L + 1, tl.num_programs(2)):
        mine = places == place
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            b_outputs = b_ptr + ((place - 1) * N + outputs).to(tl.int64)[:, None] * R
            added = tl.zeros((OUTPUTS, ROWS), tl.float32)
            for first in range(0, R, RANKS):
                ranks = first + tl.arange(0, RANKS)
                low = load_sum(
                    low_rows, ranks[:, None] + rows[None, :] * 0, mine[None, :], low_stride,
                    LOW_PARTS,
                )  # fmt: skip
                b = tl.load(b_outputs + ranks[None, :], mask=(outputs < N)[:, None], other=0.0)
                added = tl.dot(b, low.to(dtype), added, input_precision="ieee")
            mask = mine[:, None] & (outputs < N)[None, :]
            y = load_sum(y_ptr, offsets, mask, part_stride, PARTS).to(dtype).to(tl.float32)
            y = (y + tl.trans(added)).to(dtype).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + offsets, y, mask=mask)
            for other in tl.static_range(1, PARTS):
                minus_zero = tl.full((ROWS, OUTPUTS), -(2**31), tl.int32)
                zeros = minus_zero.to(tl.float32, bitcast=True)
                tl.store(y_ptr + other * part_stride + offsets, zeros, mask=mask)
