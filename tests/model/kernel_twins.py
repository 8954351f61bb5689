"""Twins of the Triton kernels: the same functions in plain torch, which tests compare with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from model.batch import SamplingBatch
from model.kernels.head import Argmax
from model.kernels.inputs import Column
from model.kernels.matmul import Product
from model.kernels.rotary import Heads
from model.sampler import sample


def multiply_twin(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    *,
    out_MN: torch.Tensor | None = None,
) -> Product:
    """By torch's product, in float32 inside."""
    bias = None if bias_N is None else bias_N.float()
    y = functional.linear(x_MK.float(), weight_NK.float(), bias)
    return Product(y.to(x_MK.dtype) if out_MN is None else out_MN.copy_(y))


def silu_mul_twin(gate_up: Product, *, dtype: torch.dtype) -> torch.Tensor:
    gate_TF, up_TF = gate_up.sum_parts(dtype).chunk(2, dim=-1)
    return functional.silu(gate_TF) * up_TF


def add_rms_norm_twin(
    residual_TC: torch.Tensor,
    delta: Product | None,
    weight_C: torch.Tensor,
    *,
    eps: float,
    rows_R: torch.Tensor | None = None,
) -> torch.Tensor:
    summed = residual_TC
    if delta is not None:
        summed = residual_TC + delta.sum_parts(residual_TC.dtype)
    if rows_R is not None:
        return functional.rms_norm(summed[rows_R.long()], weight_C.shape, weight_C, eps)
    residual_TC.copy_(summed)
    return functional.rms_norm(residual_TC, weight_C.shape, weight_C, eps)


def rotate_and_store_twin(
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
    H, K, D = heads.num_heads, heads.num_kv_heads, heads.head_dim
    q, k, v = qkv.sum_parts(dtype).unflatten(-1, (H + 2 * K, D)).split((H, K, K), dim=-2)
    if heads.q_norm_D is not None and heads.k_norm_D is not None:
        q = functional.rms_norm(q, (D,), heads.q_norm_D, heads.eps)
        k = functional.rms_norm(k, (D,), heads.k_norm_D, heads.eps)
    if heads.rotary:
        cos, sin = (half[positions_T.long()].unsqueeze(1) for half in table)
        q, k = (_rotate_twin(x, cos, sin) for x in (q, k))
    keys_XKD[kv_slots_T.long()] = k.to(keys_XKD.dtype)
    values_XKD[kv_slots_T.long()] = v.to(values_XKD.dtype)
    queries: torch.Tensor = q.contiguous()
    return queries


def _rotate_twin(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = torch.chunk(x.float(), 2, dim=-1)
    rotated: torch.Tensor = torch.cat(
        (first * cos - second * sin, second * cos + first * sin), dim=-1
    )
    return rotated.type_as(x)


def change_twin(state: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    state.view(-1)[places.long()] = values


def decode_rows_twin(
    state: torch.Tensor, batch_slots_S: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, ...]:
    entries = state[batch_slots_S.long()]
    positions = entries[:, Column.LENGTH]
    blocks = entries.gather(1, (Column.TABLE + positions // block_size).long()[:, None])[:, 0]
    kv_slots = blocks * block_size + positions % block_size
    adapters = entries[:, Column.ADAPTER]
    return entries[:, Column.LAST], positions, kv_slots, positions + 1, adapters


def mixed_rows_twin(
    state: torch.Tensor,
    batch_slots_T: torch.Tensor,
    tokens_T: torch.Tensor,
    positions_T: torch.Tensor,
    unread_T: torch.Tensor,
    *,
    block_size: int,
) -> tuple[torch.Tensor, ...]:
    entries = state[batch_slots_T.long()]
    blocks = entries.gather(1, (Column.TABLE + positions_T // block_size).long()[:, None])[:, 0]
    tokens = torch.where(unread_T > 0, entries[:, Column.LAST], tokens_T)
    kv_slots = blocks * block_size + positions_T % block_size
    return tokens, kv_slots, entries[:, Column.ADAPTER]


def advance_twin(
    state: torch.Tensor, batch_slots_R: torch.Tensor, tokens_R: torch.Tensor, *, stored: int
) -> None:
    is_owned = batch_slots_R < state.shape[0] - 1
    slots = batch_slots_R[is_owned].long()
    state[slots, Column.LAST] = tokens_R[is_owned]
    state[slots, Column.LENGTH] += stored
    state[slots, Column.INDEX] += 1


def head_twin(
    x_RC: torch.Tensor,
    weight_VC: torch.Tensor,
    *,
    logits_RV: torch.Tensor | None,
) -> Argmax:
    """Each row is one chunk. Logits without NaN."""
    y = torch.empty((len(x_RC), len(weight_VC)), device=x_RC.device)
    multiply_twin(x_RC, weight_VC, out_MN=y if logits_RV is None else logits_RV)
    return find_argmax_twin(y if logits_RV is None else logits_RV)


def find_argmax_twin(
    logits_RV: torch.Tensor,
) -> Argmax:
    """Each row is one chunk. Logits without NaN."""
    values = logits_RV.amax(-1, keepdim=True)
    return Argmax(values, logits_RV.argmax(-1, keepdim=True).int())


def merge_argmax_twin(argmax: Argmax, *, vocab_size: int, out: Argmax | None = None) -> Argmax:
    """Values without NaN."""
    values = argmax.values_RN.amax(-1, keepdim=True)
    ids = torch.where(argmax.values_RN == values, argmax.ids_RN, vocab_size - 1)
    out = out or Argmax.empty(len(values), 1, device=values.device)
    return Argmax(out.values_RN.copy_(values), out.ids_RN.copy_(ids.amin(-1, keepdim=True)))


def sample_tokens_twin(
    logits_RV: torch.Tensor,
    state: torch.Tensor,
    batch_slots_R: torch.Tensor,
) -> torch.Tensor:
    """By the sampler itself, on the host."""
    entries = state[batch_slots_R.long()].cpu().numpy()
    halves = entries[:, [Column.SEED_LOW, Column.SEED_HIGH]].astype(np.uint32).astype(np.uint64)
    floats = entries.view(np.float32)
    plain = SamplingBatch.plain(len(entries), vocab_size=logits_RV.shape[1])
    columns = replace(
        plain,
        seeds_R=halves[:, 0] | halves[:, 1] << np.uint64(32),
        choices_R=entries[:, Column.CHOICE],
        indices_R=entries[:, Column.INDEX],
        temperatures_R=floats[:, Column.TEMPERATURE],
        top_ks_R=entries[:, Column.TOP_K],
        top_ps_R=floats[:, Column.TOP_P],
        min_ps_R=floats[:, Column.MIN_P],
    )
    return sample(logits_RV.cpu(), columns).tokens_R.int().to(logits_RV.device)
