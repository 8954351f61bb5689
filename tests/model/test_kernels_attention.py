"""Paged attention in Triton against the reference, and its law: a row's bits are its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.attention import ATTENTION
from model.batch import Batch
from model.kernels.attention import Partials, paged_attention
from model.kernels.work_list import APART, BATCH_SLOT, ROWS, WorkList
from tests.support.builders import DEVICE, HALF, Piece, make_batch

pytestmark = pytest.mark.slow


def scattered(lengths: list[tuple[int, int]], block_size: int, rng: np.random.Generator) -> Batch:
    """Sequences of (context, queries) over blocks drawn at random from a pool of twice as many."""
    needed = [-(-context // block_size) for context, _ in lengths]
    drawn = rng.permutation(2 * sum(needed)).tolist()
    pieces = []
    for (context, count), blocks in zip(lengths, needed, strict=True):
        own, drawn = drawn[:blocks], drawn[blocks:]
        pieces.append(Piece(tokens=[1] * context, count=count, blocks=own))
    return make_batch(pieces)


def poisoned(
    batch: Batch, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """[X, K, D] of noise where a context lies, and NaN in every other slot."""
    blocks = 2 * int(np.sum(-(-batch.context_lens_S // block_size)))
    pool = torch.full((blocks * block_size, *shape), torch.nan)
    for table, context in zip(batch.block_table_SB, batch.context_lens_S, strict=True):
        places = np.arange(context)
        pool[table[places // block_size] * block_size + places % block_size] = torch.randn(
            context, *shape
        )
    return pool.to(device=DEVICE, dtype=dtype)


def both(
    batch: Batch, block_size: int, tensors: tuple[torch.Tensor, ...], window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    results = []
    for name in ("triton_paged", "reference"):
        backend = ATTENTION[name]()
        backend.prepare(batch, block_size=block_size, device=DEVICE)
        queries, keys, values = tensors
        results.append(backend.attend(queries, keys, values, scale=0.2, window=window))
    return results[0], results[1]


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.kernels) for seed in range(3, 60))]
)
def test_equals_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    dtype = torch.float32 if seed % 3 else HALF
    kv_heads, group = int(rng.choice([1, 2])), int(rng.choice([1, 2, 3, 8]))
    head_dim = [64, 256, 80, 96, 128, 8][seed % 6]
    block_size = [16, 32, 64, 128, 4][seed % 5]
    window = None if seed % 2 else int(rng.integers(1, 90))
    lengths = []
    for _ in range(int(rng.integers(1, 4))):
        context = int(rng.integers(1, 130))
        count = int(rng.choice([1, 1, min(context, 3), min(context, 40)]))
        lengths.append((context, count))
    batch = scattered(lengths, block_size, rng)
    queries = torch.randn(batch.num_tokens, kv_heads * group, head_dim).to(DEVICE, dtype)
    pools = [poisoned(batch, block_size, (kv_heads, head_dim), dtype) for _ in range(2)]
    given, expected = both(batch, block_size, (queries, *pools), window)
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 5, 600])
def test_contexts_over_several_splits(window: int | None) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    batch = scattered([(1100, 3), (7, 3), (1030, 1), (2, 1), (600, 40)], 16, rng)
    pools = [poisoned(batch, 16, (1, 8), torch.float32) for _ in range(2)]
    queries = torch.randn(batch.num_tokens, 2, 8).to(DEVICE)
    given, expected = both(batch, 16, (queries, *pools), window)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def test_eight_bit_keys_and_values() -> None:
    """Stored in float8, computed in the queries' type: as the reference over the rounded pool."""
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    batch = scattered([(70, 1), (33, 9)], 16, rng)
    pools = [poisoned(batch, 16, (2, 64), torch.float8_e4m3fn) for _ in range(2)]
    queries = torch.randn(batch.num_tokens, 4, 64).to(DEVICE, HALF)
    given, _ = both(batch, 16, (queries, *pools), None)
    _, expected = both(batch, 16, (queries, *(pool.to(HALF) for pool in pools)), None)
    torch.testing.assert_close(given, expected, atol=0.02, rtol=0.02)


class Fixed:
    """One long context; queries at its end, handed over in pieces of any size."""

    def __init__(self, *, split: int, window: int | None) -> None:
        torch.manual_seed(0)
        self.split, self.window = split, window
        self.queries = torch.randn(30, 4, 16).to(DEVICE)
        self.keys, self.values = (torch.randn(128, 2, 16).to(DEVICE) for _ in range(2))

    def attend(
        self,
        pieces: list[tuple[int, int]],
        *,
        most_parts: int = 99,
        shares: int = 99,
        programs: int = 2,
        order: int | None = None,
    ) -> torch.Tensor:
        """Rows [a, b) of the queries, each pair a sequence of its own in one step.

        `order`: a seed that shuffles the items. Two layers attend, alike.
        """
        counts = [end - start for start, end in pieces]
        work = WorkList(
            max_rows=64, max_sequences=32, max_context=128, group=2, device=DEVICE,
            split=self.split, most_parts=most_parts, shares=shares,
        )  # fmt: skip
        partials = Partials(work, num_heads=4, head_dim=16, device=DEVICE)
        partials.acc.fill_(torch.nan)
        partials.ml.fill_(torch.nan)
        starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=DEVICE)
        contexts = torch.tensor([98 + end - 30 for _, end in pieces], dtype=torch.int32)
        slots = torch.zeros(len(pieces), dtype=torch.int32, device=DEVICE)
        work.fill(starts, contexts.to(DEVICE), slots, window=self.window)
        if order is not None:
            listed = work.items[: int(work.counts[0])]
            generator = torch.Generator().manual_seed(order)
            listed.copy_(listed[torch.randperm(len(listed), generator=generator).to(DEVICE)])
        first, second = (
            paged_attention(
                torch.cat([self.queries[start:end] for start, end in pieces]),
                self.keys,
                self.values,
                torch.arange(32, dtype=torch.int32, device=DEVICE)[None],
                work=work,
                partials=partials,
                block_size=4,
                scale=0.3,
                window=self.window,
                programs=programs,
            )
            for _ in range(2)
        )
        assert torch.equal(first, second)  # counters of parts are as before the first
        return first


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("window", [None, 50])
def test_a_rows_bits_are_its_own(window: int | None) -> None:
    """One chunk, two, or a query at a time: splits meet in registers or in memory, bits agree."""
    fixed = Fixed(split=64, window=window)
    whole = fixed.attend([(0, 30)])
    assert torch.equal(fixed.attend([(0, 7), (7, 30)]), whole)
    singles = [(n, n + 1) for n in range(24, 30)]
    for limits in (
        {},
        {"most_parts": 5},
        {"most_parts": 0},
        {"shares": 3},
    ):  # all are items to none
        assert torch.equal(fixed.attend(singles, **limits), whole[24:])


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.kernels) for seed in range(2, 12))]
)
def test_no_bit_depends_on_the_program_of_an_item(seed: int) -> None:
    """Items in any order, by one program to more than there are items: parts have fixed places.

    Whichever program stores the last part of a query merges all of them.
    """
    fixed = Fixed(split=32, window=None)
    pieces = [(0, 3), (3, 4), (4, 24), *((n, n + 1) for n in range(24, 30))]
    shares = (3, 99)[seed % 2]  # only some queries are cut, or all
    expected = fixed.attend(pieces, shares=shares, programs=1)
    for programs in (2, 3, 7, 200):
        found = fixed.attend(pieces, shares=shares, programs=programs, order=seed)
        assert torch.equal(found, expected), programs


@pytest.mark.usefixtures("one_order")
def test_the_size_of_a_split_shows_in_the_bits() -> None:
    """So the law above compares something that can differ."""
    assert not torch.equal(
        Fixed(split=64, window=None).attend([(0, 30)]),
        Fixed(split=128, window=None).attend([(0, 30)]),
    )


@pytest.mark.parametrize(("shares", "apart"), [(1, [0, 0, 0]), (3, [0, 1, 0]), (9, [1, 1, 0])])
def test_queries_that_are_long_for_their_step_are_cut(shares: int, apart: list[int]) -> None:
    """Of 3, 5 and 1 splits, 9 in all: a query of more than one of the shares is cut."""
    work = WorkList(
        max_rows=9,
        max_sequences=3,
        max_context=640,
        group=2,
        device=DEVICE,
        split=64,
        shares=shares,
    )
    lengths = torch.tensor([192, 320, 64], dtype=torch.int32, device=DEVICE)
    steps = torch.arange(4, dtype=torch.int32, device=DEVICE)
    work.fill(steps, lengths, steps[:3], window=None)
    tiles = work.tiles[:3].tolist()
    assert [tile[APART.value] for tile in sorted(tiles)] == apart  # by their first rows
    cut = sum(splits for splits, is_cut in zip((3, 5, 1), apart, strict=True) if is_cut)
    assert work.counts.tolist() == [cut + apart.count(0), 3]


def test_every_item_is_listed_once() -> None:
    """Tiles cover the rows, items cover the splits of each single query."""
    counts, contexts = [1, 70, 1, 3], [200, 90, 64, 65]
    work = WorkList(max_rows=80, max_sequences=4, max_context=256, group=2, device=DEVICE, split=64)
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    work.fill(starts, lengths, torch.arange(4, dtype=torch.int32, device=DEVICE), window=None)
    num_items, num_tiles = work.counts.tolist()
    tiles = work.tiles[:num_tiles].tolist()
    assert num_tiles == 1 + 3 + 1 + 1
    rows = [row for first, queries, *_ in tiles for row in range(first, first + queries)]
    assert sorted(rows) == list(range(75))
    assert max(queries for _, queries, *_ in tiles) == ROWS // 2
    listed = work.items[:num_items].tolist()
    items = sorted((tiles[tile][0], index, run) for tile, index, run in listed)
    assert items == [
        *((0, part, 1) for part in range(4)),
        *((1, 0, 1), (33, 0, 2), (65, 0, 2)),
        *((71, 0, 1), (72, 0, 2)),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_items_come_first(seed: int) -> None:
    """By sequences: at the end of a step only short items are left to wait for."""
    rng = np.random.default_rng(seed)
    contexts = rng.integers(1, 2000, 20)
    counts = np.minimum(contexts, rng.choice([1, 1, 40], 20))
    work = WorkList(
        max_rows=int(counts.sum()), max_sequences=20, max_context=2000, group=2, device=DEVICE,
        split=64, shares=15,
    )  # fmt: skip
    starts, lengths, slots = (
        torch.tensor(values.astype(np.int32), device=DEVICE)
        for values in (np.cumsum([0, *counts]), contexts, np.arange(20))
    )
    work.fill(starts, lengths, slots, window=None)
    num_items, num_tiles = work.counts.tolist()
    tiles = work.tiles[:num_tiles].tolist()
    of_slot: dict[int, list[int]] = {}
    for tile, _, run in work.items[:num_items].tolist():
        of_slot.setdefault(tiles[tile][BATCH_SLOT.value], []).append(run)
    assert sorted(of_slot) == list(range(20))
    assert all(runs == sorted(runs, reverse=True) for runs in of_slot.values())
    longest = [runs[0] for runs in of_slot.values()]
    assert longest == sorted(longest, reverse=True)
