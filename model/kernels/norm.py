"""Add and RMSNorm: adds a sublayer's output to the residual stream, normalises for the next one.

One program per row; a row's sum has one order whatever the number of rows.

Legend: T rows, C hidden size, R selected rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels.launch import await_inputs, launch_options
from model.kernels.matmul import Product, load_sum


def add_rms_norm(
    residual_TC: torch.Tensor,
    delta: Product | None,
    weight_C: torch.Tensor,
    *,
    eps: float,
    rows_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds delta to the residual, in place; returns its RMSNorm, [T, C].

    With `rows_R` it reads only those rows, leaves the residual unchanged and returns [R, C]: at the
    end of the stream most rows are not needed any more.
    """
    C = residual_TC.shape[1]
    num_rows = len(residual_TC) if rows_R is None else len(rows_R)
    y = torch.empty((num_rows, C), dtype=residual_TC.dtype, device=residual_TC.device)
    if num_rows == 0:
        return y
    _add_rms_norm[(num_rows,)](
        residual_TC,
        residual_TC if delta is None else delta.values,
        weight_C,
        residual_TC if rows_R is None else rows_R,
        y,
        0 if delta is None else delta.part_stride,
        eps,
        C=C,
        BLOCK=triton.next_power_of_2(C),
        PARTS=0 if delta is None else delta.num_parts,
        SELECTED=rows_R is not None,
        num_warps=4 if C <= 2048 else 8,
        **launch_options(residual_TC.device),
    )
    return y


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _add_rms_norm(
    residual_ptr,  # [T, C]
    delta_ptr,  # [T, C], or [PARTS, T, C]
    weight_ptr,  # [C]
    rows_ptr,  # [R], if SELECTED
    y_ptr,  # [T, C], or [R, C]
    part_stride,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SELECTED: tl.constexpr,
):
    await_inputs()
    out = tl.program_id(0).to(tl.int64)
    row = out
    if SELECTED:
        row = tl.load(rows_ptr + out).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < C
    offsets = row * C + columns
    dtype = residual_ptr.dtype.element_ty
    x = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        delta = load_sum(delta_ptr, offsets, mask, part_stride, PARTS).to(dtype)
        rounded = (x + delta.to(tl.float32)).to(dtype)
        if not SELECTED:
            tl.store(residual_ptr + offsets, rounded, mask=mask)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / C + eps)
    tl.store(y_ptr + out * C + columns, (x * scale * weight).to(dtype), mask=mask)
