"""SiLU(gate) · up, of the two halves of one product. Legend: T rows, F width of the MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels.matmul import Product, activate, load_sum

_BLOCK = 1024


def silu_mul(gate_up: Product, *, dtype: torch.dtype) -> torch.Tensor:
    """[T, 2F] -> [T, F] in `dtype`, to which both halves are rounded first. Launches nothing if the
    product is activated.
    """
    if gate_up.is_activated:
        return gate_up.values
    T, double_width = gate_up.values.shape[-2:]
    width = double_width // 2
    y = torch.empty((T, width), dtype=dtype, device=gate_up.values.device)
    if T:
        _silu_mul[(T, triton.cdiv(width, _BLOCK))](
            gate_up.values,
            y,
            gate_up.part_stride,
            F=width,
            BLOCK=_BLOCK,
            PARTS=gate_up.num_parts,
            enable_fp_fusion=False,
        )
    return y


@triton.jit
def _silu_mul(
    x_ptr,  # [T, 2F], or [PARTS, T, 2F]
    y_ptr,  # [T, F]
    part_stride,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    offsets = row * 2 * F + columns
    gate = load_sum(x_ptr, offsets, mask, part_stride, PARTS)
    up = load_sum(x_ptr, offsets + F, mask, part_stride, PARTS)
    tl.store(y_ptr + row * F + columns, activate(gate, up, y_ptr.dtype.element_ty), mask=mask)
