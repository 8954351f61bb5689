"""What a step reads and leaves behind on the device: seats, their columns, the rows made of them.

All state of running sequences is one int32 tensor, a row a seat (floats by their bits):

    column   LAST    the newest token, sampled or given
             LENGTH  tokens whose KV is stored: the next one's position
             INDEX   which token of the answer is sampled next
             SEED_LOW, SEED_HIGH, CHOICE, TEMPERATURE, TOP_K, TOP_P, MIN_P
             TABLE.. the block table, to the end of the row

The last seat belongs to nobody: rows that only fill a step up sit there. Its table names a block
of its own and its columns never change.

Legend: T rows, S sequences, R rows that sample.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import triton
import triton.language as tl


class Column(IntEnum):
    """Columns of the state. TABLE is where the block table begins."""

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
    TABLE = 16


def change(state: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    """state.flatten()[places] = values; places are distinct and below 2**31."""
    if len(places):
        block = 256
        grid = (triton.cdiv(len(places), block),)
        _change[grid](state, places, values, len(places), BLOCK=block, enable_fp_fusion=False)


def change_twin(state: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    """The same in torch."""
    state.view(-1)[places.long()] = values


def decode_rows(
    state: torch.Tensor, batch_slots_S: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row a seat: (tokens, positions, slots, contexts), all [S]."""
    rows = torch.empty((4, len(batch_slots_S)), dtype=torch.int32, device=state.device)
    _rows[(triton.cdiv(len(batch_slots_S), 128),)](
        state, batch_slots_S, rows, rows, rows, rows, len(batch_slots_S), state.stride(0),
        BLOCK_SIZE=block_size, GIVEN=False, BLOCK=128, enable_fp_fusion=False,
    )  # fmt: skip
    tokens, positions, slots, contexts = rows
    return tokens, positions, slots, contexts


def mixed_rows(
    state: torch.Tensor,
    seats_T: torch.Tensor,
    tokens_T: torch.Tensor,
    positions_T: torch.Tensor,
    unread_T: torch.Tensor,
    *,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, slots) of rows given by the host; an unread row's token is its seat's newest."""
    T = len(seats_T)
    rows = torch.empty((4, T), dtype=torch.int32, device=state.device)
    _rows[(triton.cdiv(T, 128),)](
        state, seats_T, tokens_T, positions_T, unread_T, rows, T, state.stride(0),
        BLOCK_SIZE=block_size, GIVEN=True, BLOCK=128, enable_fp_fusion=False,
    )  # fmt: skip
    return rows[0], rows[2]


def decode_rows_twin(
    state: torch.Tensor, batch_slots_S: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in torch."""
    own = state[batch_slots_S.long()]
    positions = own[:, Column.LENGTH]
    blocks = own.gather(1, (Column.TABLE + positions // block_size).long()[:, None])[:, 0]
    slots = blocks * block_size + positions % block_size
    return own[:, Column.LAST], positions, slots, positions + 1


def mixed_rows_twin(
    state: torch.Tensor,
    seats_T: torch.Tensor,
    tokens_T: torch.Tensor,
    positions_T: torch.Tensor,
    unread_T: torch.Tensor,
    *,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch."""
    own = state[seats_T.long()]
    blocks = own.gather(1, (Column.TABLE + positions_T // block_size).long()[:, None])[:, 0]
    tokens = torch.where(unread_T > 0, own[:, Column.LAST], tokens_T)
    return tokens, blocks * block_size + positions_T % block_size


def advance(
    state: torch.Tensor, seats_R: torch.Tensor, tokens_R: torch.Tensor, *, stored: int
) -> None:
    """Leaves the sampled tokens in their seats and counts them; `stored` is added to LENGTH."""
    if len(seats_R):
        _advance[(triton.cdiv(len(seats_R), 128),)](
            state, seats_R, tokens_R, len(seats_R), state.shape[0] - 1, state.stride(0),
            STORED=stored, BLOCK=128, enable_fp_fusion=False,
        )  # fmt: skip


def advance_twin(
    state: torch.Tensor, seats_R: torch.Tensor, tokens_R: torch.Tensor, *, stored: int
) -> None:
    """The same in torch."""
    owned = seats_R < state.shape[0] - 1
    seats = seats_R[owned].long()
    state[seats, Column.LAST] = tokens_R[owned]
    state[seats, Column.LENGTH] += stored
    state[seats, Column.INDEX] += 1


@triton.jit(do_not_specialize=["count"])
def _change(state_ptr, places_ptr, values_ptr, count, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < count
    places = tl.load(places_ptr + lanes, mask=mask, other=0)
    tl.store(state_ptr + places, tl.load(values_ptr + lanes, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _rows(
    state_ptr,
    seats_ptr,
    tokens_ptr,
    positions_ptr,
    unread_ptr,
    out_ptr,
    count,
    stride,
    BLOCK_SIZE: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of a step, [4, count]: token, position, slot, context."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < count
    own = state_ptr + tl.load(seats_ptr + lanes, mask=mask, other=0) * stride
    token = tl.load(own, mask=mask, other=0)
    if GIVEN:
        position = tl.load(positions_ptr + lanes, mask=mask, other=0)
        unread = tl.load(unread_ptr + lanes, mask=mask, other=0) > 0
        token = tl.where(unread, token, tl.load(tokens_ptr + lanes, mask=mask, other=0))
    else:
        position = tl.load(own + 1, mask=mask, other=0)
    block = tl.load(own + 16 + position // BLOCK_SIZE, mask=mask, other=0)
    tl.store(out_ptr + lanes, token, mask=mask)
    tl.store(out_ptr + count + lanes, position, mask=mask)
    tl.store(out_ptr + 2 * count + lanes, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=mask)
    tl.store(out_ptr + 3 * count + lanes, position + 1, mask=mask)


@triton.jit(do_not_specialize=["count", "nobody"])
def _advance(
    state_ptr,
    seats_ptr,
    tokens_ptr,
    count,
    nobody,
    stride,
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seats = tl.load(seats_ptr + lanes, mask=lanes < count, other=nobody)
    mask = seats < nobody
    own = state_ptr + seats * stride
    tl.store(own, tl.load(tokens_ptr + lanes, mask=mask, other=0), mask=mask)
    tl.store(own + 1, tl.load(own + 1, mask=mask, other=0) + STORED, mask=mask)
    tl.store(own + 2, tl.load(own + 2, mask=mask, other=0) + 1, mask=mask)
