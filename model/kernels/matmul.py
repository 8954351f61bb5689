"""Products with weight matrices: y = x · wᵀ + bias, the sum over K in one order whatever M is.

    K is split into parts, whose number depends on the shape [N, K] of the weight and never on M:

        |-- part 0 --|-- part 1 --|-- part 2 --|     a part: one chain of matrix instructions
        bias + p0    (.. + p1)    (.. + p2)          parts: added in order, rounded once

Few rows: one program per part, so that every multiprocessor streams weights; the parts go to
memory in float32, and the reader of the product adds them up (`load_sum`). Many rows: one program
adds all parts, in one loop over the tiles of all of them, so that loads of the next part are in
flight while a part ends. Both give the same bits. The weight is the instruction's first operand
and the rows of x its second: a small M then takes a narrow instruction of the same kind, not
another kind.

The product of gate and up may end with SiLU(gate) · up: a tile then has outputs of both halves, and
its program adds all parts. Few programs stream as fast, if each has loads enough in flight.

Weights of 8 bits (`model.packed_weights`) are read as such and become numbers of x's dtype in
registers, before the same instruction. Blocks are multiplied by their scales there; float8 is not,
but each sum of a part by the scale of its output, a power of two. The bits are those of a product
with weights that were unpacked before.

Legend: M rows, N outputs, K inputs, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional

from model.kernels.shared_memory import multiprocessors_of, shared_memory
from model.kernels.tiling import (
    INPUTS,
    Layout,
    Tiling,
    is_apart,
    layout_for,
    part_size,
    tile_for_whole,
)

_STORED = {torch.float8_e4m3fn: "float8", torch.int8: "blocks"}  # how a weight is stored


@dataclass(frozen=True, slots=True)
class Product:
    """A product: [M, N], or in parts that are added in order: [P, M, N] in float32."""

    values: torch.Tensor
    num_parts: int = 1
    is_activated: bool = False  # [M, N / 2]: SiLU of the first half times the second

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


def multiply(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    *,
    scales: torch.Tensor | None = None,
    out_MN: torch.Tensor | None = None,
    gated: bool = False,
    tiling: Tiling | None = None,
) -> Product:
    """Computes x · wᵀ + bias: in parts if rows are few, else or with `out_MN` as [M, N].

    A weight of 8 bits, in float8 or int8, has `scales` (`model.packed_weights`). `gated`: outputs
    are those of gate, then those of up; the result is activated (see `activation.silu_mul`).
    """
    M, K = x_MK.shape
    N = weight_NK.shape[0]
    tiling, apart = _layout(x_MK, weight_NK, tiling, whole=gated or out_MN is not None)
    num_parts = triton.cdiv(K, part_size(N, K))
    if out_MN is not None:
        y = out_MN
    elif apart:
        y = torch.empty((num_parts, M, N), dtype=torch.float32, device=x_MK.device)
    else:
        y = torch.empty((M, N // 2 if gated else N), dtype=x_MK.dtype, device=x_MK.device)
    if M == 0:
        return Product(y, num_parts if apart else 1, gated)
    _product[(tiling.tiles(M, N), num_parts if apart else 1)](
        x_MK,
        weight_NK if scales is None else weight_NK.view(torch.int8),
        bias_N if bias_N is not None else x_MK,
        scales if scales is not None else x_MK,
        y,
        M,
        x_MK.stride(0),
        N=N,
        K=K,
        PART=part_size(N, K),
        PARTS_HERE=1 if apart else num_parts,
        HAS_BIAS=bias_N is not None,
        GATED=gated,
        STORED=_STORED.get(weight_NK.dtype, "plain"),
        ROWS=tiling.rows,
        OUTPUTS=tiling.outputs,
        INPUTS=INPUTS,
        num_warps=tiling.warps,
        num_stages=tiling.stages_of(x_MK),
        enable_fp_fusion=False,
    )
    return Product(y, num_parts if apart else 1, gated)


def _layout(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, tiling: Tiling | None, *, whole: bool
) -> Layout:
    """The layout of a product on the device of x; `whole`: no part goes to memory."""
    (M, K), N = x_MK.shape, len(weight_NK)
    count, limit = multiprocessors_of(x_MK.device), shared_memory(x_MK.device)
    if tiling is not None:
        return Layout(tiling, not whole and is_apart(M, N, K, tiling, count))
    if whole:
        found = tile_for_whole(M, N, K, limit=limit, multiprocessors=count)
        return Layout(found, is_apart=False)
    return layout_for(M, N, K, limit=limit, multiprocessors=count)


def multiply_by_vendor_blas(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    *,
    out_MN: torch.Tensor | None = None,
    gated: bool = False,  # noqa: ARG001 - the reader activates it
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
def activate(gate, up, dtype: tl.constexpr):
    """SiLU(gate) · up in `dtype`, to which both sums are rounded first."""
    gate = gate.to(dtype).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (active * up.to(dtype).to(tl.float32)).to(dtype)


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
def from_float8(bits, dtype: tl.constexpr):
    """Values of e4m3 bits, int8, but for NaN. In integers: not every GPU has an instruction."""
    # Sign, 4 bits of exponent and 3 of mantissa where float32 has its own, which has 120 more.
    wide = (bits.to(tl.int32) << 20) & -0x78100000
    return (wide.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)


@triton.jit
def from_int8(values):
    """int8 -> float32 by its bits, since an instruction that converts is slow: 2**23 + v + 128."""
    bits = ((values.to(tl.int32) & 0xFF) ^ 0x80) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def sum_tile(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N], if HAS_BIAS
    scale_ptr,  # float8: [N]; blocks: [N, K / 32]
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
    STORED: tl.constexpr,  # plain, float8 or blocks
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """A tile of yᵀ, [OUTPUTS, ROWS] in float32. The only place that determines an order of sums.

    Tiles of K in order form a chain from zero per part; chains are added to bias in order.
    """
    row_mask = rows < M
    output_mask = outputs < N
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + outputs.to(tl.int64)[:, None] * K
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=output_mask, other=0.0).to(tl.float32)
        total += tl.where(first_part == 0, bias, 0.0)[:, None]
    chain = tl.zeros((OUTPUTS, ROWS), tl.float32)
    TILES: tl.constexpr = PART // INPUTS
    for tile in range(PARTS_HERE * TILES):
        inputs = first_part * PART + tile * INPUTS + tl.arange(0, INPUTS)[None, :]
        if K % INPUTS == 0 and PART * ((K + PART - 1) // PART) == K:
            w = tl.load(w_rows + inputs, mask=output_mask[:, None], other=0)
            x = tl.load(x_rows + inputs, mask=row_mask[:, None], other=0.0)
        else:
            inside = inputs < K
            w = tl.load(w_rows + inputs, mask=output_mask[:, None] & inside, other=0)
            x = tl.load(x_rows + inputs, mask=row_mask[:, None] & inside, other=0.0)
        if STORED == "float8":
            w = from_float8(w, x.dtype)
        if STORED == "blocks":
            first_block = (first_part * PART + tile * INPUTS) // 32
            blocks = first_block + tl.arange(0, INPUTS // 32)[None, :]
            mask = output_mask[:, None] & (blocks < K // 32)
            scale_rows = scale_ptr + outputs[:, None] * (K // 32)
            scales = tl.load(scale_rows + blocks, mask=mask, other=0.0).to(tl.float32)
            values = tl.reshape(from_int8(w), (OUTPUTS, INPUTS // 32, 32)) * scales[:, :, None]
            w = tl.reshape(values, (OUTPUTS, INPUTS)).to(x.dtype)
        chain = tl.dot(w, tl.trans(x), chain, input_precision="ieee")
        if PARTS_HERE > 1 and tile % TILES == TILES - 1:
            total += _scaled(chain, scale_ptr, outputs, output_mask, STORED)
            chain = tl.zeros((OUTPUTS, ROWS), tl.float32)
    if PARTS_HERE == 1:
        total += _scaled(chain, scale_ptr, outputs, output_mask, STORED)
    return total


@triton.jit
def _scaled(chain, scale_ptr, outputs, output_mask, STORED: tl.constexpr):
    if STORED == "float8":
        chain = chain * tl.load(scale_ptr + outputs, mask=output_mask, other=0.0)[:, None]
    return chain


@triton.jit(do_not_specialize=["M"])
def _product(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N], if HAS_BIAS
    scale_ptr,  # float8: [N]; blocks: [N, K / 32]
    y_ptr,  # [M, N], or [P, M, N]; if GATED, [M, N / 2]
    M,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
    PARTS_HERE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    STORED: tl.constexpr,  # plain, float8 or blocks
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """One tile of y, over one part of K or over all."""
    row_tile, output_tile = place_tile(M, N, ROWS, OUTPUTS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, OUTPUTS)
    if GATED:
        # Eight of gate, then eight of up: what an instruction leaves to one thread is a pair.
        half = lanes // 16 * 8 + lanes % 8 + output_tile * (OUTPUTS // 2)
        outputs = half + lanes // 8 % 2 * (N // 2)
    else:
        outputs = output_tile * OUTPUTS + lanes
    first_part = tl.program_id(1)
    total = sum_tile(
        x_ptr, w_ptr, bias_ptr, scale_ptr, rows, outputs, first_part, M, x_stride,
        N, K, PART, PARTS_HERE, HAS_BIAS, STORED, ROWS, OUTPUTS, INPUTS,
    )  # fmt: skip
    WIDTH: tl.constexpr = N // 2 if GATED else N
    if GATED:
        pairs = tl.reshape(total, (OUTPUTS // 16, 2, 8, ROWS)).permute(0, 2, 3, 1)
        gate, up = tl.split(pairs)
        total = tl.reshape(activate(gate, up, y_ptr.dtype.element_ty), (OUTPUTS // 2, ROWS))
        outputs = output_tile * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
    y_rows = y_ptr + first_part.to(tl.int64) * M * WIDTH + rows.to(tl.int64)[:, None] * WIDTH
    mask = (rows < M)[:, None] & (outputs < WIDTH)[None, :]
    tl.store(y_rows + outputs[None, :], tl.trans(total).to(y_ptr.dtype.element_ty), mask=mask)
