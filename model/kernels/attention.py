"""Paged attention: decoded tokens, chunks of prompts, cached prefixes and verification, all alike.

A sequence's queries are cut into tiles; the query heads that share a key head are rows of one tile.
The context is cut into splits of a fixed size at absolute positions. An item is one tile, one key
head and a run of splits:

    positions   0 ....... | SPLIT ...... | 2 SPLIT .... | ... context end
    one query   item        item           item               parts meet in memory (`_merge`)
    a chunk     |------------- one item: parts meet in registers --------|

A query is one item, as a chunk is, if its splits no longer fit into `Partials`, and in a step that
fills the GPU with longer items.

Inside a split the softmax runs in steps of STEP positions, and finished splits are merged in order
of position, by the same arithmetic in both cases. A row's bits therefore depend on its own position
and context alone. Positions that a row may not see weigh exactly 0.

A fixed number of programs works through the items of a step (`model.kernels.work_list`). The items
are dealt like cards, longest first and back and forth, so that programs end together:

    program      0   1   2   3
    items        0   1   2   3
                 7   6   5   4
                 8   9  ...

The program that stores the last part of a query merges all of them. Which program computes or
merges what affects no bit: parts have fixed places.

Legend: T rows, H query heads, K key heads, G = H / K, D head dimension, X KV slots, B
blocks of a block table. Of a softmax, as in FlashAttention: m largest score, l sum of weights p,
acc weighted sum of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels.launch import await_inputs, launch_options
from model.kernels.shared_memory import HOPPER, shared_memory, stages_within
from model.kernels.work_list import (
    BATCH_SLOT,
    END,
    FIRST_ITEM,
    FIRST_ROW,
    FIRST_SPLIT,
    ITEM_COLUMNS,
    POSITION,
    QUERIES,
    ROWS,
    TILE_COLUMNS,
    WorkList,
)

STEP = 64  # positions per step of the softmax; an answer's bits depend on it
_PROGRAMS_ON_CPU = 2  # the interpreter runs one after another


class Partials:
    """Unmerged results of single queries, reused by every layer of a step.

    arrivals [tiles, H]: parts stored, by tile and the first head of a key head; 0 between launches.
    """

    def __init__(
        self, work: WorkList, *, num_heads: int, head_dim: int, device: torch.device
    ) -> None:
        # A part is stored only for single queries, so an item's index is a place of its own for G
        # rows.
        self.acc = torch.empty(
            (work.max_items, num_heads, head_dim), dtype=torch.float32, device=device
        )
        self.ml = torch.empty((work.max_items, num_heads, 2), dtype=torch.float32, device=device)
        self.arrivals = torch.zeros((work.max_tiles, num_heads), dtype=torch.int32, device=device)


def attention_programs(device: torch.device) -> int:
    """Programs that work through the items: two per multiprocessor."""
    if device.type != "cuda":
        return _PROGRAMS_ON_CPU
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


def paged_attention(
    q_THD: torch.Tensor,
    keys_XKD: torch.Tensor,
    values_XKD: torch.Tensor,
    table_SB: torch.Tensor,
    *,
    work: WorkList,
    partials: Partials,
    block_size: int,
    scale: float,
    window: int | None,
    programs: int,
    causal: bool = True,
) -> torch.Tensor:
    """Attends each query to its sequence's positions up to its own; returns [T, H, D].

    Not `causal`: to all of them, or within the window on either side. `work` was filled for the
    same step, window and direction; `table_SB` is indexed by its batch slots. Launches that share
    `work` or `partials` must follow each other on one stream.
    """
    H, D = q_THD.shape[1:]
    K = keys_XKD.shape[1]
    out_THD = torch.empty_like(q_THD)
    width = max(16, triton.next_power_of_2(D))  # matrix instructions take 16 inputs
    warps, stages = attention_layout(
        width,
        itemsize=q_THD.element_size(),
        kv_itemsize=keys_XKD.element_size(),
        limit=shared_memory(q_THD.device),
    )
    _attend[(programs,)](
        q_THD,
        keys_XKD,
        values_XKD,
        table_SB,
        out_THD,
        partials.acc,
        partials.ml,
        partials.arrivals,
        work.tiles,
        work.items,
        work.counts,
        table_SB.stride(0),
        scale * 1.4426950408889634,  # the softmax counts in powers of 2
        0 if window is None else window,
        BLOCK_SIZE=block_size,
        SPLIT=work.split,
        SPLIT_BLOCKS=triton.next_power_of_2((work.split - 1) // block_size + 2),
        STEP=STEP,
        ROWS=ROWS,
        WINDOWED=window is not None,
        CAUSAL=causal,
        H=H,
        K=K,
        D=D,
        BLOCK_D=width,
        PARTS_GROUP=triton.next_power_of_2(H // K),
        num_warps=warps,
        num_stages=stages,
        **launch_options(q_THD.device),  # no fusion: both places that merge splits round alike
    )
    return out_THD


def attention_layout(
    width: int, *, itemsize: int, kv_itemsize: int, limit: int = HOPPER
) -> tuple[int, int]:
    """Warps of a program and steps whose keys and values are in shared memory together.

    `limit`: bytes of shared memory per program. Four warps hold heads of 128 in their registers on
    GPUs of which two such programs fit into a multiprocessor; elsewhere eight do.
    """
    stages = stages_within(
        limit,
        stage=2 * STEP * width * kv_itemsize,
        fixed=ROWS * width * itemsize,  # the queries
        most=3 if itemsize < 4 and width <= 128 else 2,
    )
    return 4 if width <= (128 if limit >= HOPPER else 64) else 8, stages


@triton.jit
def _join(m_i, l_i, acc, m_new, l_new, acc_new):
    """Merges a later run of positions into an earlier one; either may have seen nothing."""
    joint = tl.maximum(m_i, m_new)
    safe = tl.where(joint == float("-inf"), 0.0, joint)
    old = tl.exp2(m_i - safe)
    new = tl.exp2(m_new - safe)
    l_i = l_i * old + l_new * new
    acc = acc * old[:, None] + acc_new * new[:, None]
    return joint, l_i, acc


@triton.jit(do_not_specialize=["window"])
def _attend(
    q_ptr,  # [T, H, D]
    keys_ptr,  # [X, K, D]
    values_ptr,  # [X, K, D]
    table_ptr,  # [batch slots, B]
    out_ptr,  # [T, H, D]
    acc_ptr,  # [items, H, D]
    ml_ptr,  # [items, H, 2]
    arrivals_ptr,  # [tiles, H]
    tiles_ptr,  # [tiles, 8]
    items_ptr,  # [items, 3]
    counts_ptr,  # [2]
    table_stride,
    scale,
    window,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,  # at least those that a split touches
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAUSAL: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS_GROUP: tl.constexpr,  # G, or the next power of 2
):
    """Works through the items; a tile's row r is query r // G, head r % G of its group."""
    await_inputs()
    GROUP: tl.constexpr = H // K
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, ROWS)
    steps = tl.arange(0, STEP)
    lanes = tl.arange(0, SPLIT_BLOCKS)
    dim_mask = dims < D
    dtype = q_ptr.dtype.element_ty
    # Nothing is hoisted out of the loops: inside them registers are short.
    for turn in tl.range(_turns(tl.load(counts_ptr) * K), disable_licm=True):
        work = turn * tl.num_programs(0) + _lane(turn)
        item = work // K
        kv_head = work % K
        tile = tiles_ptr + tl.load(items_ptr + item * ITEM_COLUMNS) * TILE_COLUMNS
        index = tl.load(items_ptr + item * ITEM_COLUMNS + 1)
        run = tl.load(items_ptr + item * ITEM_COLUMNS + 2)
        first_row = tl.load(tile + FIRST_ROW)
        queries = tl.load(tile + QUERIES)
        position = tl.load(tile + POSITION)
        blocks = table_ptr + tl.load(tile + BATCH_SLOT).to(tl.int64) * table_stride
        low = tl.load(tile + FIRST_SPLIT)
        end = tl.load(tile + END)

        query = rows // GROUP
        row_mask = (query < queries) & (rows < ROWS // GROUP * GROUP)
        head = kv_head * GROUP + rows % GROUP
        q_rows = (first_row + query).to(tl.int64) * H + head
        q_mask = row_mask[:, None] & dim_mask[None, :]
        q = tl.load(q_ptr + q_rows[:, None] * D + dims[None, :], mask=q_mask, other=0.0)
        q_positions = position + query

        m_all = tl.full((ROWS,), float("-inf"), tl.float32)
        l_all = tl.zeros((ROWS,), tl.float32)
        acc_all = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for split in tl.range(low + index, low + index + run, disable_licm=True):
            m_i = tl.full((ROWS,), float("-inf"), tl.float32)
            l_i = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
            begin = split * SPLIT
            # The blocks of the split, before its loop: loads of keys that waited for a load of the
            # table could not be in flight ahead of their step.
            first_block = begin // BLOCK_SIZE
            table = tl.load(
                blocks + first_block + lanes,
                mask=(first_block + lanes) * BLOCK_SIZE < tl.minimum(begin + SPLIT, end),
                other=0,
            )
            if WINDOWED:
                begin = tl.maximum(begin, tl.maximum(position + 1 - window, 0) // STEP * STEP)
            stop = tl.minimum(split * SPLIT + SPLIT, end)
            for step in tl.range(begin, stop, STEP, disable_licm=True):
                kv_positions = step + steps
                stored = kv_positions < end
                place = tl.where(stored, kv_positions // BLOCK_SIZE - first_block, 0)
                block = tl.gather(table, place, axis=0)
                kv_slots = block.to(tl.int64) * BLOCK_SIZE + kv_positions % BLOCK_SIZE
                offsets = (kv_slots * K + kv_head)[:, None] * D + dims[None, :]
                kv_mask = stored[:, None] & dim_mask[None, :]
                k = tl.load(keys_ptr + offsets, mask=kv_mask, other=0.0).to(dtype)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                seen = stored[None, :] & row_mask[:, None]
                if CAUSAL:
                    seen = kv_positions[None, :] <= q_positions[:, None]
                elif WINDOWED:
                    seen = seen & (kv_positions[None, :] < q_positions[:, None] + window)
                if WINDOWED:
                    seen = seen & (kv_positions[None, :] > q_positions[:, None] - window)
                scores = tl.where(seen, scores, float("-inf"))
                m_new = tl.maximum(m_i, tl.max(scores, axis=1))
                safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                p = tl.exp2(scores - safe[:, None])
                fade = tl.exp2(m_i - safe)
                l_i = l_i * fade + tl.sum(p, axis=1)
                v = tl.load(values_ptr + offsets, mask=kv_mask, other=0.0).to(dtype)
                acc = acc * fade[:, None]
                acc = tl.dot(p.to(dtype), v, acc, input_precision="ieee")
                m_i = m_new
            m_all, l_all, acc_all = _join(m_all, l_all, acc_all, m_i, l_i, acc)
        # Read again: what is kept over the loops is missing from their registers.
        tile_index = tl.load(items_ptr + item * ITEM_COLUMNS, volatile=True)
        tile = tiles_ptr + tile_index * TILE_COLUMNS
        run = tl.load(items_ptr + item * ITEM_COLUMNS + 2, volatile=True)
        first_row = tl.load(tile + FIRST_ROW, volatile=True)
        queries = tl.load(tile + QUERIES, volatile=True)
        end = tl.load(tile + END, volatile=True)
        num_splits = (end + SPLIT - 1) // SPLIT - tl.load(tile + FIRST_SPLIT, volatile=True)
        row_mask = (query < queries) & (rows < ROWS // GROUP * GROUP)
        q_rows = (first_row + query).to(tl.int64) * H + head
        q_mask = row_mask[:, None] & dim_mask[None, :]
        if run == num_splits:
            share = acc_all / tl.where(row_mask, l_all, 1.0)[:, None]
            tl.store(out_ptr + q_rows[:, None] * D + dims[None, :], share.to(dtype), mask=q_mask)
        else:
            first_item = tl.load(tile + FIRST_ITEM, volatile=True).to(tl.int64)
            index = tl.load(items_ptr + item * ITEM_COLUMNS + 1, volatile=True)
            part_rows = (first_item + index) * H + head
            tl.store(ml_ptr + part_rows * 2, m_all, mask=row_mask)
            tl.store(ml_ptr + part_rows * 2 + 1, l_all, mask=row_mask)
            parts = acc_ptr + part_rows[:, None] * D + dims[None, :]
            tl.store(parts, acc_all, mask=q_mask)
            tl.debug_barrier()  # all threads have stored before one of them counts the part
            arrivals = arrivals_ptr + tile_index * H + kv_head * GROUP
            if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_splits - 1:
                tl.store(arrivals, 0)
                _merge(
                    out_ptr, acc_ptr, ml_ptr, first_row.to(tl.int64), first_item, num_splits,
                    kv_head, PARTS_GROUP, H, K, D, BLOCK_D,
                )  # fmt: skip


@triton.jit
def _lane(turn):
    """Which of the items of a turn is this program's: in odd turns they are dealt backwards."""
    return tl.where(turn % 2 == 0, tl.program_id(0), tl.num_programs(0) - 1 - tl.program_id(0))


@triton.jit
def _turns(num_items):
    """The turns in which this program has an item."""
    full = num_items // tl.num_programs(0)
    return full + (_lane(full) < num_items % tl.num_programs(0)).to(tl.int32)


@triton.jit
def _merge(
    out_ptr,  # [T, H, D]
    acc_ptr,  # [items, H, D]
    ml_ptr,  # [items, H, 2]
    row,
    first_item,
    num_splits,
    kv_head,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the splits of a single query, in order of position."""
    lanes = tl.arange(0, GROUP)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * (H // K) + lanes
    row_mask = lanes < H // K
    mask = row_mask[:, None] & (dims < D)[None, :]
    m_i = tl.full((GROUP,), float("-inf"), tl.float32)
    l_i = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, BLOCK_D), tl.float32)
    for index in tl.range(num_splits, loop_unroll_factor=4):  # loads of four in flight
        rows = (first_item + index) * H + heads
        m_new = tl.load(ml_ptr + rows * 2, mask=row_mask, other=0.0)
        l_new = tl.load(ml_ptr + rows * 2 + 1, mask=row_mask, other=1.0)
        parts = acc_ptr + rows[:, None] * D + dims[None, :]
        acc_new = tl.load(parts, mask=mask, other=0.0)
        m_i, l_i, acc = _join(m_i, l_i, acc, m_new, l_new, acc_new)
    share = acc / l_i[:, None]
    out = out_ptr + (row * H + heads)[:, None] * D + dims[None, :]
    tl.store(out, share.to(out_ptr.dtype.element_ty), mask=mask)
