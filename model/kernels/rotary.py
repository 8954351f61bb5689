"""After the QKV product: norm of each query and key head, rotary positions, K and V to the pool.

Legend: T rows, H query heads, K key heads, D head dimension, X KV slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from model.config import ModelConfig
from model.kernels.launch import await_inputs, launch_options
from model.kernels.matmul import Product, load_sum
from model.layers import inverse_frequencies

_HEADS = 8  # heads per program


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How the columns of a QKV product divide into heads, and what is applied to each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm_D: torch.Tensor | None = None
    k_norm_D: torch.Tensor | None = None
    eps: float = 0.0
    rotary: bool = True


def rotary_table(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Cosines, then sines, of every position's angles: [2, positions, D / 2] in float32."""
    positions = torch.arange(config.max_model_len, device=device).float()
    angles = positions[:, None] * inverse_frequencies(config, device)
    return torch.stack((angles.cos(), angles.sin()))


def rotate_and_store(
    qkv: Product,
    heads: Heads,
    *,
    table: torch.Tensor,
    positions_T: torch.Tensor,
    kv_slots_T: torch.Tensor,
    keys_XKD: torch.Tensor,
    values_XKD: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns queries [T, H, D] in `dtype`; stores K and V in their KV slots."""
    T = qkv.values.shape[-2]
    H, K, D = heads.num_heads, heads.num_kv_heads, heads.head_dim
    q_THD = torch.empty((T, H, D), dtype=dtype, device=qkv.values.device)
    if T == 0:
        return q_THD
    normed = heads.q_norm_D is not None
    _rotate_and_store[(T, triton.cdiv(H + 2 * K, _HEADS))](
        qkv.values,
        q_THD,
        keys_XKD,
        values_XKD,
        heads.q_norm_D if normed else table,
        heads.k_norm_D if normed else table,
        table,
        positions_T,
        kv_slots_T,
        qkv.part_stride,
        table.shape[1],
        heads.eps,
        H=H,
        K=K,
        HALF=D // 2,
        BLOCK=triton.next_power_of_2(D // 2),
        HEADS=_HEADS,
        PARTS=qkv.num_parts,
        NORMED=normed,
        ROTARY=heads.rotary,
        num_warps=4,
        **launch_options(q_THD.device),
    )
    return q_THD


@triton.jit(
    do_not_specialize=["num_positions"],
    do_not_specialize_on_alignment=["positions_ptr", "kv_slots_ptr"],
)
def _rotate_and_store(
    qkv_ptr,  # [T, (H + 2K) * D], or [PARTS, T, (H + 2K) * D]
    q_ptr,  # [T, H, D]
    keys_ptr,  # [X, K, D]
    values_ptr,  # [X, K, D]
    q_norm_ptr,  # [D], if NORMED
    k_norm_ptr,  # [D], if NORMED
    table_ptr,  # [2, num_positions, D / 2]
    positions_ptr,  # [T]
    kv_slots_ptr,  # [T]
    part_stride,
    num_positions,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    NORMED: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Some heads of one row, as two halves: pair d of a rotation is (d, d + D / 2)."""
    await_inputs()
    D: tl.constexpr = 2 * HALF
    row = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    half = tl.arange(0, BLOCK)[None, :]
    inside = half < HALF
    mask = inside & (heads < H + 2 * K)
    dtype = q_ptr.dtype.element_ty
    offsets = row * (H + 2 * K) * D + heads * D + half
    first = load_sum(qkv_ptr, offsets, mask, part_stride, PARTS).to(dtype)
    second = load_sum(qkv_ptr, offsets + HALF, mask, part_stride, PARTS).to(dtype)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    if NORMED:
        norm_a = tl.load(k_norm_ptr + half, mask=inside, other=0.0).to(tl.float32)
        norm_b = tl.load(k_norm_ptr + HALF + half, mask=inside, other=0.0).to(tl.float32)
        query_a = tl.load(q_norm_ptr + half, mask=inside, other=0.0).to(tl.float32)
        query_b = tl.load(q_norm_ptr + HALF + half, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(a * a + b * b, axis=1) / D + eps)[:, None]
        a = (a * scale * tl.where(heads < H, query_a, norm_a)).to(dtype).to(tl.float32)
        b = (b * scale * tl.where(heads < H, query_b, norm_b)).to(dtype).to(tl.float32)
    if ROTARY:
        position = tl.load(positions_ptr + row).to(tl.int64)
        angles = table_ptr + position * HALF + half
        cos = tl.load(angles, mask=inside, other=0.0)
        sin = tl.load(angles + num_positions.to(tl.int64) * HALF, mask=inside, other=0.0)
        rotated = a * cos - b * sin
        b = b * cos + a * sin
        a = rotated
    slot = tl.load(kv_slots_ptr + row).to(tl.int64)
    query = q_ptr + (row * H + heads) * D + half
    is_query = inside & (heads < H)
    tl.store(query, a.to(dtype), mask=is_query)
    tl.store(query + HALF, b.to(dtype), mask=is_query)
    stored = keys_ptr.dtype.element_ty
    key = keys_ptr + (slot * K + heads - H) * D + half
    is_key = inside & (heads >= H) & (heads < H + K)
    tl.store(key, a.to(stored), mask=is_key)
    tl.store(key + HALF, b.to(stored), mask=is_key)
    value = values_ptr + (slot * K + heads - H - K) * D + half
    is_value = mask & (heads >= H + K)
    tl.store(value, first.to(stored), mask=is_value)
    tl.store(value + HALF, second.to(stored), mask=is_value)
