"""Products with weight matrices: y = x · wᵀ + bias, the sum over K in one order whatever M is.

    K is split into parts, whose number depends on the shape [N, K] of the weight and never on M:

        |-- part 0 --|-- part 1 --|-- part 2 --|     a part: one chain of matrix instructions
        bias + p0    (.. + p1)    (.. + p2)          parts: added in order, rounded once

Few rows: one program per part, so that every multiprocessor streams weights; the parts go to
memory in float32, and the reader of the product adds them up (`load_sum`). Many rows: one program
adds all parts. Both give the same bits. The weight is the instruction's first operand and the rows
of x its second: a small M then takes a narrow instruction of the same kind, not another kind.

Legend: M rows, N outputs, K inputs, P parts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional

from model.kernels.shared_memory import HOPPER, MARGIN, shared_memory, stages_within

_MIN_PART = 256  # inputs per part; below, the parts' own traffic outweighs the weights'
_PROGRAMS = 264  # two per multiprocessor of the chips this was sized for; independent of M
_MAX_PARTS = 16
INPUTS = 128  # K of one tile, the same in every tiling; a part is a whole number of tiles


@dataclass(frozen=True, slots=True)
class Product:
    """A product: [M, N], or in parts that are added in order: [P, M, N] in float32."""

    values: torch.Tensor
    num_parts: int = 1

    @property
    def part_stride(self) -> int:
        """Elements from one part to the next."""
        return self.values.stride(0) if self.num_parts > 1 else 0

    def sum_parts(self, dtype: torch.dtype) -> torch.Tensor:
        """The product as [M, N]."""
        if self.num_parts == 1:
            return self.values
        total = self.values[0]
        for part in self.values[1:]:
            total = total + part
        return total.to(dtype)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is laid out on the chip. It affects speed and no bit."""

    rows: int
    outputs: int
    warps: int
    stages: int

    def stages_of(self, x: torch.Tensor) -> int:
        """Stages that fit into the shared memory of the operand's device; fewer for float32."""
        return stages_within(
            shared_memory(x.device), stage=self.stage_bytes(x.element_size()), most=self.stages
        )

    def stage_bytes(self, itemsize: int) -> int:
        return (self.rows + self.outputs) * INPUTS * itemsize


_TILINGS = (  # for at most so many rows; outputs are a multiple of 64: one warp group's instruction
    (16, Tiling(16, 64, 4, 5)),
    (32, Tiling(32, 64, 4, 4)),
    (64, Tiling(64, 64, 4, 4)),
    (128, Tiling(128, 64, 4, 3)),
)
_MANY_ROWS = Tiling(128, 128, 8, 3)
_LESS_SHARED = Tiling(128, 64, 8, 3)  # from 65 rows on, if three stages of that do not fit


def tiling_for(num_rows: int, *, limit: int = HOPPER) -> Tiling:
    """The tiling of a product of `num_rows` rows. `limit`: bytes of shared memory per program."""
    if num_rows > 64 and _MANY_ROWS.stages * _MANY_ROWS.stage_bytes(2) + MARGIN > limit:
        return _LESS_SHARED
    return next((tiling for most, tiling in _TILINGS if num_rows <= most), _MANY_ROWS)


def layout_sizes(most: int) -> list[int]:
    """Numbers of rows up to `most`: the first of each tiling and of each further tile of rows."""
    starts = [1, *(rows + 1 for rows, _ in _TILINGS), *range(1, most + 1, _MANY_ROWS.rows)]
    return sorted({start for start in starts if start <= most})


def layout_for(
    num_rows: int, num_outputs: int, num_inputs: int, *, limit: int = HOPPER
) -> tuple[Tiling, bool]:
    """The tiling of a product, and whether its parts go to memory, if there are several."""
    tiling = tiling_for(num_rows, limit=limit)
    return tiling, _is_apart(num_rows, num_outputs, num_inputs, tiling)


def _is_apart(num_rows: int, num_outputs: int, num_inputs: int, tiling: Tiling) -> bool:
    tiles = triton.cdiv(num_rows, tiling.rows) * triton.cdiv(num_outputs, tiling.outputs)
    return part_size(num_outputs, num_inputs) < num_inputs and tiles * 2 <= _PROGRAMS


@functools.cache
def part_size(num_outputs: int, num_inputs: int) -> int:
    """Inputs of a part, a function of the weight's shape alone."""
    wanted = triton.cdiv(_PROGRAMS, triton.cdiv(num_outputs, 64))
    parts = max(1, min(wanted, num_inputs // _MIN_PART, _MAX_PARTS))
    return int(triton.cdiv(triton.cdiv(num_inputs, parts), INPUTS) * INPUTS)


def multiply(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    *,
    out_MN: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> Product:
    """Computes x · wᵀ + bias: in parts if rows are few, else or with `out_MN` as [M, N]."""
    M, K = x_MK.shape
    N = weight_NK.shape[0]
    tiling = tiling or tiling_for(M, limit=shared_memory(x_MK.device))
    part = part_size(N, K)
    num_parts = triton.cdiv(K, part)
    tiles = triton.cdiv(M, tiling.rows) * triton.cdiv(N, tiling.outputs)
    apart = out_MN is None and _is_apart(M, N, K, tiling)
    if out_MN is not None:
        y = out_MN
    elif apart:
        y = torch.empty((num_parts, M, N), dtype=torch.float32, device=x_MK.device)
    else:
        y = torch.empty((M, N), dtype=x_MK.dtype, device=x_MK.device)
    if M == 0:
        return Product(y, num_parts if apart else 1)
    _product[(tiles, num_parts if apart else 1)](
        x_MK,
        weight_NK,
        bias_N if bias_N is not None else weight_NK,
        y,
        M,
        x_MK.stride(0),
        N=N,
        K=K,
        PART=part,
        PARTS_HERE=1 if apart else num_parts,
        HAS_BIAS=bias_N is not None,
        ROWS=tiling.rows,
        OUTPUTS=tiling.outputs,
        INPUTS=INPUTS,
        num_warps=tiling.warps,
        num_stages=tiling.stages_of(x_MK),
        enable_fp_fusion=False,
    )
    return Product(y, num_parts if apart else 1)


def multiply_by_vendor_blas(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    *,
    out_MN: torch.Tensor | None = None,
) -> Product:
    """By torch's product (cuBLAS), whose order of sums depends on M: not exact.

    The cost of exactness is measured against this.
    """
    y = functional.linear(x_MK, weight_NK, bias_N)
    return Product(y if out_MN is None else out_MN.copy_(y))


@triton.jit
def load_sum(ptr, offsets, mask, part_stride, PARTS: tl.constexpr):
    """Elements of a product: its parts added in order, in float32."""
    total = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(ptr + part * part_stride + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def place_tile(M, N: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """The tile of rows and the tile of outputs that this program computes."""
    # Tiles of eight row tiles side by side share their weights in the L2 cache.
    GROUP: tl.constexpr = 8
    num_row_tiles = tl.cdiv(M, ROWS)
    num_output_tiles: tl.constexpr = (N + OUTPUTS - 1) // OUTPUTS
    tile = tl.program_id(0)
    first_row_tile = tile // (GROUP * num_output_tiles) * GROUP
    group_rows = tl.minimum(num_row_tiles - first_row_tile, GROUP)
    within = tile % (GROUP * num_output_tiles)
    return first_row_tile + within % group_rows, within // group_rows


@triton.jit
def sum_tile(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N], if HAS_BIAS
    rows,
    outputs,
    first_part,
    M,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
    PARTS_HERE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """A tile of yᵀ, [OUTPUTS, ROWS] in float32. The only place that determines an order of sums."""
    row_mask = rows < M
    output_mask = outputs < N
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + outputs.to(tl.int64)[:, None] * K
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=output_mask, other=0.0).to(tl.float32)
        total += tl.where(first_part == 0, bias, 0.0)[:, None]
    for part in range(PARTS_HERE):
        start = (first_part + part) * PART
        chain = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for offset in range(0, PART, INPUTS):
            inputs = start + offset + tl.arange(0, INPUTS)[None, :]
            if K % INPUTS == 0 and PART * ((K + PART - 1) // PART) == K:
                w = tl.load(w_rows + inputs, mask=output_mask[:, None], other=0.0)
                x = tl.load(x_rows + inputs, mask=row_mask[:, None], other=0.0)
            else:
                inside = inputs < K
                w = tl.load(w_rows + inputs, mask=output_mask[:, None] & inside, other=0.0)
                x = tl.load(x_rows + inputs, mask=row_mask[:, None] & inside, other=0.0)
            chain = tl.dot(w, tl.trans(x), chain, input_precision="ieee")
        total += chain
    return total


@triton.jit(do_not_specialize=["M"])
def _product(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N], if HAS_BIAS
    y_ptr,  # [M, N], or [P, M, N]
    M,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
    PARTS_HERE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """One tile of y, over one part of K or over all."""
    row_tile, output_tile = place_tile(M, N, ROWS, OUTPUTS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    outputs = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    first_part = tl.program_id(1)
    total = sum_tile(
        x_ptr, w_ptr, bias_ptr, rows, outputs, first_part, M, x_stride,
        N, K, PART, PARTS_HERE, HAS_BIAS, ROWS, OUTPUTS, INPUTS,
    )  # fmt: skip
    y_rows = y_ptr + first_part.to(tl.int64) * M * N + rows.to(tl.int64)[:, None] * N
    mask = (rows < M)[:, None] & (outputs < N)[None, :]
    tl.store(y_rows + outputs[None, :], tl.trans(total).to(y_ptr.dtype.element_ty), mask=mask)
