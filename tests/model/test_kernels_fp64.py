"""Kernels against their twins in float64, where what nobody wrote and nobody may read is NaN.

Every output and every buffer that a kernel's launcher allocates begins as NaN, so an element left
out shows; every slot of the KV pool that no context holds is NaN, in whole blocks and in the rest
of a sequence's last one, so a place read too much shows. Shapes are drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from model.attention import ATTENTION
from model.batch import Batch
from model.kernels.activation import silu_mul
from model.kernels.matmul import Product, multiply
from model.kernels.norm import add_rms_norm
from tests.model.kernel_twins import (
    add_rms_norm_twin,
    silu_mul_twin,
)
from tests.support.builders import DEVICE, HALF, Piece, make_batch, noise

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, HALF]
SEEDS = [*range(2), *(pytest.param(seed, marks=pytest.mark.kernels) for seed in range(2, 40))]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated and not filled holds NaN."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocated

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def assert_close(given: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of the type; `expected` is in float64."""
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert expected.dtype is torch.float64
    torch.testing.assert_close(given.double(), expected, atol=tolerance, rtol=tolerance)


def drawn_batch(rng: np.random.Generator, block_size: int) -> tuple[Batch, torch.Tensor]:
    """Sequences over blocks drawn from a pool of twice as many; and which slots they hold."""
    contexts = rng.integers(1, 140, int(rng.integers(1, 4))).tolist()
    blocks = rng.permutation(2 * sum(-(-context // block_size) for context in contexts)).tolist()
    held = torch.zeros(len(blocks) * block_size, dtype=torch.bool)
    pieces = []
    for context in contexts:
        count = int(rng.choice([1, 1, min(context, 40)]))
        own = [blocks.pop() for _ in range(-(-context // block_size))]
        pieces.append(Piece(tokens=[1] * context, count=count, blocks=own))
        for place in range(context):
            held[own[place // block_size] * block_size + place % block_size] = True
    return make_batch(pieces), held.to(DEVICE)


def attend(
    name: str, batch: Batch, tensors: list[torch.Tensor], block_size: int, window: int | None
) -> torch.Tensor:
    backend = ATTENTION[name]()
    backend.prepare(batch, block_size=block_size, device=DEVICE)
    queries, keys, values = tensors
    return backend.attend(queries, keys, values, scale=0.2, window=window)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn], ids=["", "fp8"])
def test_attention(seed: int, stored: torch.dtype | None) -> None:
    """Head sizes, block sizes, windows and groups; chunks beside decoded rows."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    dtype = HALF if stored or seed % 2 else torch.float32
    block_size = int(rng.choice([16, 32, 64, 128]))
    head_dim = int(rng.choice([64, 80, 96, 128, 256]))
    kv_heads, group = int(rng.choice([1, 2])), int(rng.choice([1, 2, 3, 4]))
    window = int(rng.integers(1, 90)) if rng.integers(2) else None
    batch, held = drawn_batch(rng, block_size)
    queries = noise(batch.num_tokens, kv_heads * group, head_dim, dtype=dtype)
    pools = [noise(len(held), kv_heads, head_dim, dtype=torch.float32) for _ in range(2)]
    for pool in pools:
        pool[~held] = torch.nan
    pools = [pool.to(stored or dtype) for pool in pools]
    wide = [queries.double(), *(pool.double() for pool in pools)]
    given = attend("triton_paged", batch, [queries, *pools], block_size, window)
    assert_close(given, attend("reference", batch, wide, block_size, window), dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype, seed: int) -> None:
    """In parts and whole, with and without a bias."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    M, N, K = int(rng.integers(1, 70)), int(rng.integers(1, 200)), int(rng.choice([40, 256, 900]))
    x, weight = noise(M, K, dtype=dtype), noise(N, K, dtype=dtype) / math.sqrt(K)
    bias = noise(N, dtype=dtype) if seed % 2 else None
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    assert_close(multiply(x, weight, bias).sum_parts(dtype), expected, dtype)
    whole = torch.empty((M, N), device=DEVICE)
    multiply(x, weight, bias, out_MN=whole)
    assert_close(whole, expected, dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", dict.fromkeys([*DTYPES, torch.bfloat16]))
def test_norms_and_gates(dtype: torch.dtype, seed: int) -> None:
    """In bfloat16, too: the interpreter does not round it, but only products are wrong."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rows, width, parts = (
        int(rng.integers(1, 5)),
        int(rng.integers(2, 1100)),
        int(rng.integers(1, 4)),
    )
    residual, weight = noise(rows, width, dtype=dtype), noise(width, dtype=dtype)
    delta = Product(noise(parts, rows, width, dtype=torch.float32), parts)
    if parts == 1:
        delta = Product(noise(rows, width, dtype=dtype))
    wide, wide_delta = residual.double(), Product(delta.values.double(), delta.num_parts)
    given = add_rms_norm(residual, delta, weight, eps=1e-5)
    assert_close(given, add_rms_norm_twin(wide, wide_delta, weight.double(), eps=1e-5), dtype)
    assert_close(residual, wide, dtype)
    gates = Product(noise(parts, rows, 2 * width, dtype=torch.float32), parts)
    if parts == 1:
        gates = Product(noise(rows, 2 * width, dtype=dtype))
    wide_gates = Product(gates.values.double(), gates.num_parts)
    expected = silu_mul_twin(wide_gates, dtype=torch.float64)
    assert_close(silu_mul(gates, dtype=dtype), expected, dtype)
