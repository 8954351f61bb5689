"""The items of a step's attention, listed once, on the device, and read by every layer.

`model.kernels.attention` explains tiles, splits and items. No launch depends on numbers that only
the device knows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLIT = 256  # positions; an answer's bits depend on it
ROWS = 64  # rows of a tile: one instruction, even if a single query fills only a few

# Columns of the tile list. APART: whether each split is an item, from FIRST_ITEM on, and the parts
# meet in memory. END: the positions that its queries see are below it.
FIRST_ROW, QUERIES, POSITION, BATCH_SLOT, FIRST_SPLIT, FIRST_ITEM, APART, END, TILE_COLUMNS = (
    tl.constexpr(column) for column in range(9)
)
ITEM_COLUMNS = tl.constexpr(3)
_ALL = 1 << 20
_MOST_PARTS = 4096  # of a step: more programs than any GPU has, and all splits of a pool unshared


class WorkList:
    """Buffers for the items of a step; as large as the largest step needs. The longest come first.

    tiles [.., 8]   first row of T, queries, position of the first, batch slot, first split, first
                    item, whether its splits are items, end of the positions
    items [.., 3]   tile, index of its first split (counted from the tile's first), splits
    counts [2]      items, tiles
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_sequences: int,
        max_context: int,
        group: int,
        device: torch.device,
        split: int = SPLIT,
        shares: int = _ALL,
        most_parts: int = _MOST_PARTS,
    ) -> None:
        """The splits of a single query are items if it has more than 1 of `shares` of the step's.

        `most_parts`: splits that may be items of their own. Both affect speed and no bit.
        """
        self.split = split
        self.shares = shares
        self.queries = ROWS // group  # of one tile
        self.max_tiles = max_sequences + triton.cdiv(max_rows, self.queries)
        self.most_parts = min(most_parts, max_sequences * triton.cdiv(max_context, split))
        self.max_items = self.most_parts + self.max_tiles
        self.tiles = torch.zeros(
            (self.max_tiles, TILE_COLUMNS.value), dtype=torch.int32, device=device
        )
        self.items = torch.zeros(
            (self.max_items, ITEM_COLUMNS.value), dtype=torch.int32, device=device
        )
        self.counts = torch.zeros(2, dtype=torch.int32, device=device)

    def fill(
        self,
        starts_S1: torch.Tensor,
        contexts_S: torch.Tensor,
        batch_slots_S: torch.Tensor,
        *,
        window: int | None,
        causal: bool = True,
    ) -> None:
        """Lists the items of a step. `contexts_S`: tokens stored when the step is done.

        Every sequence has at least one query. `window`: positions a query sees, itself included; if
        attention is not `causal`, on either side.
        """
        S = len(batch_slots_S)
        _list_items[(1,)](
            starts_S1,
            contexts_S,
            batch_slots_S,
            self.tiles,
            self.items,
            self.counts,
            S,
            0 if window is None else window,
            self.shares,
            self.most_parts,
            TILE_QUERIES=self.queries,
            SPLIT=self.split,
            WINDOWED=window is not None,
            CAUSAL=causal,
            BLOCK=max(16, triton.next_power_of_2(S)),
            enable_fp_fusion=False,
        )


def shares_for(programs: int, num_kv_heads: int) -> int:
    """Shares of which a quarter of a program's work is one: items as long as that end together."""
    return int(triton.cdiv(4 * programs, num_kv_heads))


@triton.jit(
    do_not_specialize=["S", "window", "shares", "most_parts"],
    do_not_specialize_on_alignment=["starts_ptr", "contexts_ptr", "batch_slots_ptr"],
)
def _list_items(
    starts_ptr,  # [S + 1]
    contexts_ptr,  # [S]
    batch_slots_ptr,  # [S]
    tiles_ptr,  # [tiles, 8]
    items_ptr,  # [items, 3]
    counts_ptr,  # [2]
    S,
    window,
    shares,
    most_parts,
    TILE_QUERIES: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a lane per sequence, an iteration per tile or split of the longest one."""
    lanes = tl.arange(0, BLOCK)
    mask = lanes < S
    start = tl.load(starts_ptr + lanes, mask=mask, other=0)
    count = tl.load(starts_ptr + lanes + 1, mask=mask, other=0) - start
    context = tl.load(contexts_ptr + lanes, mask=mask, other=0)
    batch_slot = tl.load(batch_slots_ptr + lanes, mask=mask, other=0)
    first_split = tl.zeros((BLOCK,), tl.int32)
    if WINDOWED:
        first_split = tl.maximum(context - window, 0) // SPLIT
    splits = (context + SPLIT - 1) // SPLIT - first_split
    num_tiles = (count + TILE_QUERIES - 1) // TILE_QUERIES
    all_splits = tl.sum(tl.where(mask, num_tiles * splits, 0), axis=0)
    long = mask & (count == 1) & (splits > 1) & (splits * shares > all_splits)
    parts = tl.where(long, splits, 0)

    # By the longest item of a sequence, in splits; among equals in the order of the step.
    length = tl.where(mask, tl.where(long, 1, splits), 0)
    order = BLOCK - 1 - tl.sort(length * BLOCK + (BLOCK - 1 - lanes), descending=True) % BLOCK
    mask = order < S
    start = tl.gather(start, order, axis=0)
    count = tl.gather(count, order, axis=0)
    context = tl.gather(context, order, axis=0)
    batch_slot = tl.gather(batch_slot, order, axis=0)
    num_tiles = tl.gather(num_tiles, order, axis=0)
    parts = tl.gather(parts, order, axis=0)
    apart = (parts > 0) & (tl.cumsum(parts, axis=0) <= most_parts)
    num_items = tl.where(mask, tl.where(apart, parts, num_tiles), 0)
    tile_end = tl.cumsum(num_tiles, axis=0)
    item_end = tl.cumsum(num_items, axis=0)
    tile_base = tile_end - num_tiles
    item_base = item_end - num_items
    tl.store(counts_ptr, tl.sum(num_items, axis=0))
    tl.store(counts_ptr + 1, tl.sum(num_tiles, axis=0))

    for index in range(tl.max(num_tiles, axis=0)):
        here = mask & (index < num_tiles)
        queries = tl.minimum(count - index * TILE_QUERIES, TILE_QUERIES)
        position = context - count + index * TILE_QUERIES
        low = tl.zeros((BLOCK,), tl.int32)
        if WINDOWED:
            low = tl.maximum(position + 1 - window, 0) // SPLIT
        end = position + queries
        if not CAUSAL:
            end = context
            if WINDOWED:
                end = tl.minimum(context, position + queries - 1 + window)
        tile = tiles_ptr + (tile_base + index) * TILE_COLUMNS
        tl.store(tile + FIRST_ROW, start + index * TILE_QUERIES, mask=here)
        tl.store(tile + QUERIES, queries, mask=here)
        tl.store(tile + POSITION, position, mask=here)
        tl.store(tile + BATCH_SLOT, batch_slot, mask=here)
        tl.store(tile + FIRST_SPLIT, low, mask=here)
        tl.store(tile + FIRST_ITEM, item_base, mask=here)
        tl.store(tile + APART, apart.to(tl.int32), mask=here)
        tl.store(tile + END, end, mask=here)
        # The last tile of a prompt sees the most positions.
        item = items_ptr + (item_base + num_tiles - 1 - index) * ITEM_COLUMNS
        whole = here & (apart == 0)
        tl.store(item, tile_base + index, mask=whole)
        tl.store(item + 1, 0, mask=whole)
        tl.store(item + 2, (end + SPLIT - 1) // SPLIT - low, mask=whole)
    for index in range(tl.max(tl.where(apart, num_items, 0), axis=0)):
        here = apart & (index < num_items)
        item = items_ptr + (item_base + index) * ITEM_COLUMNS
        tl.store(item, tile_base, mask=here)
        tl.store(item + 1, index, mask=here)
        tl.store(item + 2, 1, mask=here)
