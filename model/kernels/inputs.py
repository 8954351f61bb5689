"""The state of batch slots on the device, and the rows of a step that are made from it.

The state is one int32 tensor with a row per batch slot (floats by their bits):

    column   LAST    the newest token, sampled or given
             LENGTH  tokens whose KV is stored: the position of the next one
             INDEX   which token of the answer is sampled next
             SEED_LOW, SEED_HIGH, CHOICE, TEMPERATURE, TOP_K, TOP_P, MIN_P
             ADAPTER its number, from 1; 0: none
             TABLE.. the block table, to the end of the row

The last row is the pad slot, that of padding rows. Its block table names a block of its own and its
columns never change.

Legend: T rows, S sequences, R rows that sample, N batch slots and the pad slot, C columns.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import triton
import triton.language as tl


class Column(IntEnum):
    """Columns of the state. TABLE is the first of the block table."""

    LAST = 0
    LENGTH = 1
    INDEX = 2
    SEED_LOW = 3
    SEED_HIGH = 4
    CHOICE = 5
    TEMPERATURE = 6
    TOP_K = 7
    TOP_P = 8
    MIN_P = 9
    ADAPTER = 10
    TABLE = 16


# The same for kernels, which read no globals but constants of Triton.
(
    LAST, LENGTH, INDEX, SEED_LOW, SEED_HIGH, CHOICE, TEMPERATURE, TOP_K, TOP_P, MIN_P, ADAPTER,
    TABLE,
) = (tl.constexpr(column.value) for column in Column)  # fmt: skip


def change(state: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    """state.flatten()[places] = values; places are distinct and below 2**31."""
    if len(places):
        block = 256
        grid = (triton.cdiv(len(places), block),)
        _change[grid](state, places, values, len(places), BLOCK=block, enable_fp_fusion=False)


def decode_rows(
    state: torch.Tensor, batch_slots_S: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, ...]:
    """One row per batch slot: (tokens, positions, KV slots, contexts, adapters), all [S]."""
    rows = torch.empty((5, len(batch_slots_S)), dtype=torch.int32, device=state.device)
    _rows[(triton.cdiv(len(batch_slots_S), 128),)](
        state, batch_slots_S, rows, rows, rows, rows, len(batch_slots_S), state.stride(0),
        BLOCK_SIZE=block_size, GIVEN=False, BLOCK=128, enable_fp_fusion=False,
    )  # fmt: skip
    return tuple(rows)


def mixed_rows(
    state: torch.Tensor,
    batch_slots_T: torch.Tensor,
    tokens_T: torch.Tensor,
    positions_T: torch.Tensor,
    unread_T: torch.Tensor,
    *,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, KV slots, adapters) of rows given by the host; an unread row's token is its slot's
    newest.
    """
    T = len(batch_slots_T)
    rows = torch.empty((5, T), dtype=torch.int32, device=state.device)
    _rows[(triton.cdiv(T, 128),)](
        state, batch_slots_T, tokens_T, positions_T, unread_T, rows, T, state.stride(0),
        BLOCK_SIZE=block_size, GIVEN=True, BLOCK=128, enable_fp_fusion=False,
    )  # fmt: skip
    return rows[0], rows[2], rows[4]


def embed(tokens_T: torch.Tensor, weight_VC: torch.Tensor) -> torch.Tensor:
    """The rows of the embedding, [T, C]."""
    T, C = len(tokens_T), weight_VC.shape[1]
    y = torch.empty((T, C), dtype=weight_VC.dtype, device=weight_VC.device)
    if T:
        block = min(1024, triton.next_power_of_2(C))
        _embed[(T, triton.cdiv(C, block))](
            tokens_T, weight_VC, y, C=C, BLOCK=block, enable_fp_fusion=False
        )
    return y


def advance(
    state: torch.Tensor, batch_slots_R: torch.Tensor, tokens_R: torch.Tensor, *, stored: int
) -> None:
    """Writes the sampled tokens to their batch slots and counts them; adds `stored` to LENGTH."""
    if len(batch_slots_R):
        _advance[(triton.cdiv(len(batch_slots_R), 128),)](
            state, batch_slots_R, tokens_R, len(batch_slots_R), state.shape[0] - 1, state.stride(0),
            STORED=stored, BLOCK=128, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["count"], do_not_specialize_on_alignment=["places_ptr", "values_ptr"]
)
def _change(
    state_ptr,  # [N, C], flat
    places_ptr,  # [count]
    values_ptr,  # [count]
    count,
    BLOCK: tl.constexpr,
):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < count
    places = tl.load(places_ptr + lanes, mask=mask, other=0)
    tl.store(state_ptr + places, tl.load(values_ptr + lanes, mask=mask, other=0), mask=mask)


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["batch_slots_ptr", "tokens_ptr", "positions_ptr", "unread_ptr"],
)
def _rows(
    state_ptr,  # [N, C]
    batch_slots_ptr,  # [count]
    tokens_ptr,  # [count]; this and the next two if GIVEN
    positions_ptr,  # [count]
    unread_ptr,  # [count]
    out_ptr,  # [5, count]: token, position, KV slot, context, adapter
    count,
    stride,
    BLOCK_SIZE: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Makes the rows of a step."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < count
    entry = state_ptr + tl.load(batch_slots_ptr + lanes, mask=mask, other=0) * stride
    token = tl.load(entry + LAST, mask=mask, other=0)
    if GIVEN:
        position = tl.load(positions_ptr + lanes, mask=mask, other=0)
        unread = tl.load(unread_ptr + lanes, mask=mask, other=0) > 0
        token = tl.where(unread, token, tl.load(tokens_ptr + lanes, mask=mask, other=0))
    else:
        position = tl.load(entry + LENGTH, mask=mask, other=0)
    block = tl.load(entry + TABLE + position // BLOCK_SIZE, mask=mask, other=0)
    tl.store(out_ptr + lanes, token, mask=mask)
    tl.store(out_ptr + count + lanes, position, mask=mask)
    tl.store(out_ptr + 2 * count + lanes, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=mask)
    tl.store(out_ptr + 3 * count + lanes, position + 1, mask=mask)
    adapter = tl.load(entry + ADAPTER, mask=mask, other=0)
    tl.store(out_ptr + 4 * count + lanes, adapter, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["tokens_ptr"])
def _embed(
    tokens_ptr,  # [T]
    weight_ptr,  # [V, C]
    y_ptr,  # [T, C]
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < C
    token = tl.load(tokens_ptr + row).to(tl.int64)
    values = tl.load(weight_ptr + token * C + columns, mask=mask, other=0.0)
    tl.store(y_ptr + row * C + columns, values, mask=mask)


@triton.jit(
    do_not_specialize=["count", "pad_slot"],
    do_not_specialize_on_alignment=["batch_slots_ptr", "tokens_ptr"],
)
def _advance(
    state_ptr,  # [N, C]
    batch_slots_ptr,  # [count]
    tokens_ptr,  # [count]
    count,
    pad_slot,
    stride,
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(batch_slots_ptr + lanes, mask=lanes < count, other=pad_slot)
    mask = slots < pad_slot
    entry = state_ptr + slots * stride
    tl.store(entry + LAST, tl.load(tokens_ptr + lanes, mask=mask, other=0), mask=mask)
    length, index = entry + LENGTH, entry + INDEX
    tl.store(length, tl.load(length, mask=mask, other=0) + STORED, mask=mask)
    tl.store(index, tl.load(index, mask=mask, other=0) + 1, mask=mask)
