"""Paged attention: decoded tokens, chunks of prompts, cached prefixes and verification, all alike.

A sequence's queries are cut into tiles; the query heads that share a key head are rows of one tile.
The context is cut into splits of a fixed size at absolute positions. An item is one tile, one key
head and a run of splits:

    positions   0 ....... | SPLIT ...... | 2 SPLIT .... | ... context end
    one query   item        item           item               parts meet in memory (`_merge`)
    a chunk     |------------- one item: parts meet in registers --------|

A query whose splits no longer fit into `Partials` is one item, as a chunk is.

Inside a split the softmax runs in steps of STEP positions, and finished splits are merged in order
of position, by the same arithmetic in both cases. A row's bits therefore depend on its own position
and context alone. Positions that a row may not see weigh exactly 0.

A fixed number of programs works through the items of a step (`model.kernels.work_list`).

Legend: T rows, H query heads, K key heads, G = H / K, D head dimension, X KV slots, B
blocks of a block table. Of a softmax, as in FlashAttention: m largest score, l sum of weights p,
acc weighted sum of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from model.kernels.shared_memory import shared_memory, stages_within
from model.kernels.work_list import (
    APART,
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
    """Unmerged results of single queries, reused by every layer of a step."""

    def __init__(
        self, work: WorkList, *, num_heads: int, head_dim: int, device: torch.device
    ) -> None:
        # A part is stored only for single queries, so an item's index is a place of its own for G
        # rows.
        self.acc = torch.empty(
            (work.max_items, num_heads, head_dim), dtype=torch.float32, device=device
        )
        self.ml = torch.empty((work.max_items, num_heads, 2), dtype=torch.float32, device=device)


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
    merges: int,
    causal: bool = True,
) -> torch.Tensor:
    """Attends each query to its sequence's positions up to its own; returns [T, H, D].

    Not `causal`: to all of them, or within the window on either side. `work` was filled for the
    same step, window and direction; `table_SB` is indexed by its batch slots. `merges` is at least
    the number of the step's tiles, which the host knows (`WorkList.num_tiles`), or 1 if no query
    has a sequence and several splits to itself.
    """
    H, D = q_THD.shape[1:]
    K = keys_XKD.shape[1]
    out_THD = torch.empty_like(q_THD)
    shared = {
        "H": H,
        "K": K,
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),  # matrix instructions take 16 inputs
        "enable_fp_fusion": False,  # both kernels merge; rounding must not depend on context
    }
    _attend[(programs,)](
        q_THD,
        keys_XKD,
        values_XKD,
        table_SB,
        out_THD,
        partials.acc,
        partials.ml,
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
        num_warps=4 if shared["BLOCK_D"] <= 128 else 8,  # two programs fit; wider ones spill
        num_stages=_stages(q_THD, keys_XKD, shared["BLOCK_D"]),
        **shared,
    )
    _merge[(merges, K)](
        out_THD,
        partials.acc,
        partials.ml,
        work.tiles,
        work.counts,
        SPLIT=work.split,
        GROUP=triton.next_power_of_2(H // K),
        num_warps=1 if H // K <= 4 else 4,
        **shared,
    )
    return out_THD


def _stages(q: torch.Tensor, keys: torch.Tensor, width: int) -> int:
    """Steps whose keys and values are in shared memory together, beside the queries."""
    return stages_within(
        shared_memory(q.device),
        stage=2 * STEP * width * keys.element_size(),
        fixed=ROWS * width * q.element_size(),
        most=3 if q.element_size() < 4 and width <= 128 else 2,
    )


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
):
    """Works through the items; a tile's row r is query r // G, head r % G of its group."""
    GROUP: tl.constexpr = H // K
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, ROWS)
    steps = tl.arange(0, STEP)
    lanes = tl.arange(0, SPLIT_BLOCKS)
    dim_mask = dims < D
    dtype = q_ptr.dtype.element_ty
    num_items = tl.load(counts_ptr) * K
    for work in range(tl.program_id(0), num_items, tl.num_programs(0)):
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
        num_splits = (end + SPLIT - 1) // SPLIT - low

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
        for split in range(low + index, low + index + run):
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
            for step in range(begin, tl.minimum(split * SPLIT + SPLIT, end), STEP):
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
        if run == num_splits:
            share = acc_all / tl.where(row_mask, l_all, 1.0)[:, None]
            tl.store(out_ptr + q_rows[:, None] * D + dims[None, :], share.to(dtype), mask=q_mask)
        else:
            part_rows = item.to(tl.int64) * H + head
            tl.store(ml_ptr + part_rows * 2, m_all, mask=row_mask)
            tl.store(ml_ptr + part_rows * 2 + 1, l_all, mask=row_mask)
            parts = acc_ptr + part_rows[:, None] * D + dims[None, :]
            tl.store(parts, acc_all, mask=q_mask)


@triton.jit
def _merge(
    out_ptr,  # [T, H, D]
    acc_ptr,  # [items, H, D]
    ml_ptr,  # [items, H, 2]
    tiles_ptr,  # [tiles, 8]
    counts_ptr,  # [2]
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the splits of a single query, in order of position."""
    if tl.program_id(0) >= tl.load(counts_ptr + 1):
        return
    tile = tiles_ptr + tl.program_id(0) * TILE_COLUMNS
    if tl.load(tile + APART) == 0:
        return
    num_splits = (tl.load(tile + END) + SPLIT - 1) // SPLIT - tl.load(tile + FIRST_SPLIT)
    first_item = tl.load(tile + FIRST_ITEM).to(tl.int64)
    lanes = tl.arange(0, GROUP)
    dims = tl.arange(0, BLOCK_D)
    heads = tl.program_id(1) * (H // K) + lanes
    row_mask = lanes < H // K
    mask = row_mask[:, None] & (dims < D)[None, :]
    m_i = tl.full((GROUP,), float("-inf"), tl.float32)
    l_i = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, BLOCK_D), tl.float32)
    for index in range(num_splits):
        rows = (first_item + index) * H + heads
        m_new = tl.load(ml_ptr + rows * 2, mask=row_mask, other=0.0)
        l_new = tl.load(ml_ptr + rows * 2 + 1, mask=row_mask, other=1.0)
        parts = acc_ptr + rows[:, None] * D + dims[None, :]
        acc_new = tl.load(parts, mask=mask, other=0.0)
        m_i, l_i, acc = _join(m_i, l_i, acc, m_new, l_new, acc_new)
    share = acc / l_i[:, None]
    first_row = tl.load(tile + FIRST_ROW).to(tl.int64)
    out = out_ptr + (first_row * H + heads)[:, None] * D + dims[None, :]
    tl.store(out, share.to(out_ptr.dtype.element_ty), mask=mask)
