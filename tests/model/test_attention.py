"""Every backend gives what the reference gives, whatever lies in blocks that are not theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.attention import ATTENTION, Attention
from model.attention.torch_paged import FEW_QUERIES
from model.batch import Batch
from model.transformer import plain_attention
from tests.support.builders import Piece, make_batch

CPU = torch.device("cpu")


def scattered(lengths: list[tuple[int, int]], block_size: int, rng: np.random.Generator) -> Batch:
    """Sequences of (context, queries) over blocks drawn at random from a pool of twice as many."""
    needed = [-(-context // block_size) for context, _ in lengths]
    drawn = rng.permutation(2 * sum(needed)).tolist()
    pieces = []
    for (context, count), blocks in zip(lengths, needed, strict=True):
        own, drawn = drawn[:blocks], drawn[blocks:]
        pieces.append(Piece(tokens=[1] * context, count=count, blocks=own))
    batch = make_batch(pieces)
    batch.check(block_size=block_size, num_blocks=2 * sum(needed), vocab_size=97)
    return batch


def poisoned_pool(
    batch: Batch, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """[X, K, D] of noise where a context lies, and NaN in every other slot."""
    blocks = 2 * int(np.sum(-(-batch.context_lens_S // block_size)))
    pool = torch.full((blocks * block_size, *shape), torch.nan, dtype=dtype)
    for table, context in zip(batch.block_table_SB, batch.context_lens_S, strict=True):
        for position in range(context):
            slot = table[position // block_size] * block_size + position % block_size
            pool[slot] = torch.randn(shape, dtype=dtype)
    return pool


def attend(
    backend: Attention,
    batch: Batch,
    block_size: int,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    window: int | None,
) -> torch.Tensor:
    backend.prepare(batch, block_size=block_size, device=CPU)
    return backend.attend(*tensors, scale=0.3, window=window)


# Not the kernels: what interprets them on a CPU cannot multiply bfloat16. They have tests of their
# own (`test_kernels_attention.py`).
@pytest.mark.parametrize("name", sorted(set(ATTENTION) - {"reference", "triton_paged"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(25))
def test_equals_the_reference(name: str, dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    block_size, kv_heads = int(rng.choice([1, 4, 16])), int(rng.choice([1, 2, 3]))
    heads, head_dim = kv_heads * int(rng.choice([1, 2, 3])), int(rng.choice([2, 8, 16]))
    lengths = []
    for _ in range(rng.integers(1, 7)):
        context = int(rng.integers(1, 70))
        choices = [1, 1, min(context, 3), context, int(rng.integers(1, context + 1))]
        lengths.append((context, int(rng.choice(choices))))
    window = None if seed % 2 else int(rng.integers(1, 30))
    batch = scattered(lengths, block_size, rng)
    queries = torch.randn(batch.num_tokens, heads, head_dim, dtype=dtype)
    keys = poisoned_pool(batch, block_size, (kv_heads, head_dim), dtype)
    values = poisoned_pool(batch, block_size, (kv_heads, head_dim), dtype)
    tensors = (queries, keys, values)
    expected = attend(ATTENTION["reference"](), batch, block_size, tensors, window)
    given = attend(ATTENTION[name](), batch, block_size, tensors, window)
    tolerance = 1e-5 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 5, 700])
def test_long_and_short_together(window: int | None) -> None:
    """Contexts over 512 positions, where fused kernels work in several parts, some all masked."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    batch = scattered([(1100, 3), (7, 3), (1030, 1), (2, 1), (900, 40), (600, 600)], 16, rng)
    tensors = (
        torch.randn(batch.num_tokens, 2, 4),
        poisoned_pool(batch, 16, (1, 4), torch.float32),
        poisoned_pool(batch, 16, (1, 4), torch.float32),
    )
    expected = attend(ATTENTION["reference"](), batch, 16, tensors, window)
    given = attend(ATTENTION["torch_paged"](), batch, 16, tensors, window)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def test_one_backend_serves_many_steps_and_windows() -> None:
    """What was prepared for one step or window does not leak into another."""
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    backend = ATTENTION["torch_paged"]()
    for lengths in ([(30, 1), (9, 1)], [(30, FEW_QUERIES + 1)], [(5, 2), (6, 2), (40, 1)]):
        batch = scattered(lengths, 4, rng)
        tensors = (
            torch.randn(batch.num_tokens, 4, 8),
            poisoned_pool(batch, 4, (2, 8), torch.float32),
            poisoned_pool(batch, 4, (2, 8), torch.float32),
        )
        backend.prepare(batch, block_size=4, device=CPU)
        for window in (None, 3, None, 12):
            expected = attend(ATTENTION["reference"](), batch, 4, tensors, window)
            given = backend.attend(*tensors, scale=0.3, window=window)
            torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_the_reference_is_attention_as_written_down(window: int | None) -> None:
    """Two independent truths agree: the loop over slots and the sum over whole texts."""
    torch.manual_seed(0)
    length, block_size = 11, 4
    blocks = [2, 0, 1]
    batch = make_batch([Piece(tokens=[1] * length, count=length, blocks=blocks)])
    q, k, v = torch.randn(length, 4, 8), torch.randn(length, 2, 8), torch.randn(length, 2, 8)
    keys, values = torch.zeros(12, 2, 8), torch.zeros(12, 2, 8)
    slots = [blocks[p // block_size] * block_size + p % block_size for p in range(length)]
    keys[slots], values[slots] = k, v
    given = attend(ATTENTION["reference"](), batch, block_size, (q, keys, values), window)
    expected = plain_attention(q, k, v, layer=0, scale=0.3, window=window)
    torch.testing.assert_close(given, expected)
