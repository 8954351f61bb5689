"""Every kernel gives what its twin gives. (Products in detail: `test_kernels_products`.)

Without a GPU the kernels run in Triton's interpreter (`tests/conftest.py`), with one they run
compiled.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from model.kernels.activation import silu_mul
from model.kernels.inputs import (
    Column,
    advance,
    change,
    decode_rows,
    embed,
    mixed_rows,
)
from model.kernels.matmul import Product, multiply, multiply_by_vendor_blas
from model.kernels.norm import add_rms_norm
from model.kernels.rotary import Heads, rotary_table, rotate_and_store
from model.layers import rotate, rotation
from tests.model.kernel_twins import (
    add_rms_norm_twin,
    advance_twin,
    change_twin,
    decode_rows_twin,
    mixed_rows_twin,
    multiply_twin,
    rotate_and_store_twin,
    silu_mul_twin,
)
from tests.support.builders import DEVICE, HALF, noise, tiny_model_config

pytestmark = pytest.mark.slow


def ints(values: object) -> torch.Tensor:
    return torch.as_tensor(values).to(device=DEVICE, dtype=torch.int32)


def product(parts: int, *shape: int) -> Product:
    return Product(noise(parts, *shape), parts) if parts > 1 else Product(noise(*shape))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_multiply_is_its_twin(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    M, N, K = int(rng.integers(1, 40)), int(rng.integers(1, 140)), int(rng.choice([24, 256, 700]))
    x, weight = noise(M, K, dtype=dtype), noise(N, K, dtype=dtype) / math.sqrt(K)
    bias = noise(N, dtype=dtype) if seed % 2 else None
    expected = multiply_twin(x, weight, bias).values
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    for given in (multiply(x, weight, bias), multiply_by_vendor_blas(x, weight, bias)):
        torch.testing.assert_close(given.sum_parts(dtype), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_add_rms_norm_is_its_twin(parts: int, dtype: torch.dtype) -> None:
    torch.manual_seed(parts)
    residual, weight = noise(3, 48, dtype=dtype), noise(48, dtype=dtype)
    delta = product(parts, 3, 48) if parts else None
    if parts == 1:
        delta = Product(noise(3, 48, dtype=dtype))
    other = residual.clone()
    given = add_rms_norm(residual, delta, weight, eps=1e-5)
    expected = add_rms_norm_twin(other, delta, weight, eps=1e-5)
    tolerance = 1e-6 if dtype is torch.float32 else 0.01
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(residual, other)
    rows = ints([2, 0, 2])
    before = residual.clone()
    given = add_rms_norm(residual, delta, weight, eps=1e-5, rows_R=rows)
    expected = add_rms_norm_twin(other, delta, weight, eps=1e-5, rows_R=rows)
    torch.testing.assert_close(given, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("parts", [1, 2])
def test_silu_mul_is_its_twin(parts: int) -> None:
    torch.manual_seed(parts)
    gate_up = product(parts, 3, 2 * 1030)
    given = silu_mul(gate_up, dtype=torch.float32)
    torch.testing.assert_close(given, silu_mul_twin(gate_up, dtype=torch.float32))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_heads_are_placed_as_the_twin_places_them(
    parts: int, *, normed: bool, rotary: bool
) -> None:
    torch.manual_seed(parts)
    config = tiny_model_config(head_dim=12, max_model_len=60)
    heads = Heads(
        num_heads=6,
        num_kv_heads=2,
        head_dim=12,
        q_norm_D=noise(12) if normed else None,
        k_norm_D=noise(12) if normed else None,
        eps=1e-5,
        rotary=rotary,
    )
    qkv = product(parts, 3, 10 * 12)
    pools = [torch.full((9, 2, 12), 7.0, device=DEVICE) for _ in range(4)]
    fields: dict[str, Any] = {
        "table": rotary_table(config, DEVICE),
        "positions_T": ints([3, 0, 59]),
        "kv_slots_T": ints([5, 8, 2]),
        "dtype": torch.float32,
    }
    queries = [
        rotate_and_store(qkv, heads, keys_XKD=pools[0], values_XKD=pools[1], **fields),
        rotate_and_store_twin(qkv, heads, keys_XKD=pools[2], values_XKD=pools[3], **fields),
    ]
    torch.testing.assert_close(queries[0], queries[1])
    torch.testing.assert_close(pools[0], pools[2])
    torch.testing.assert_close(pools[1], pools[3])
    assert (pools[0][[0, 1, 3, 4, 6, 7]] == 7).all()


def test_the_rotary_twin_is_the_networks_own_rotation() -> None:
    config = tiny_model_config(num_heads=2, num_kv_heads=1)
    qkv = torch.randn(5, 4, 8)
    positions = torch.tensor([0, 1, 7, 30, 500])
    pool = torch.zeros(5, 1, 8)
    given = rotate_and_store_twin(
        Product(qkv.flatten(1)),
        Heads(num_heads=2, num_kv_heads=1, head_dim=8),
        table=rotary_table(config, torch.device("cpu")),
        positions_T=positions,
        kv_slots_T=torch.arange(5),
        keys_XKD=pool,
        values_XKD=torch.zeros(5, 1, 8),
        dtype=torch.float32,
    )
    expected = rotate(qkv[:, :3], rotation(positions, config))
    torch.testing.assert_close(given, expected[:, :2])
    torch.testing.assert_close(pool, expected[:, 2:])


def test_the_embedding_is_read_by_rows() -> None:
    weight = noise(9, 1100, dtype=HALF)
    tokens = ints([8, 0, 3, 3])
    assert torch.equal(embed(tokens, weight), weight[tokens.long()])
    assert embed(tokens[:0], weight).shape == (0, 1100)


def state_of(slots: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    state = rng.integers(0, 50, (slots + 1, Column.TABLE + 20)).astype(np.int32)
    return ints(state)


def test_rows_are_made_of_seats_as_the_twins_make_them() -> None:
    state, slots = state_of(5), ints([4, 0, 3])
    for given, expected in zip(
        decode_rows(state, slots, block_size=4),
        decode_rows_twin(state, slots, block_size=4),
        strict=True,
    ):
        assert torch.equal(given, expected)
    rows = (ints([4, 4, 0, 2]), ints([11, 12, 13, 14]), ints([0, 1, 60, 7]), ints([0, 0, 1, 1]))
    for given, expected in zip(
        mixed_rows(state, *rows, block_size=4),
        mixed_rows_twin(state, *rows, block_size=4),
        strict=True,
    ):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("stored", [0, 1])
def test_seats_advance_as_the_twins_do_and_nobodys_never(stored: int) -> None:
    one, other, slots = state_of(5), state_of(5), ints([4, 5, 0])
    advance(one, slots, ints([71, 72, 73]), stored=stored)
    advance_twin(other, slots, ints([71, 72, 73]), stored=stored)
    assert torch.equal(one, other)
    assert torch.equal(one[5], state_of(5)[5])
    places = ints(np.random.default_rng(1).permutation(one.numel())[:150])
    change(one, places, places + 1)
    change_twin(other, places, places + 1)
    assert torch.equal(one, other)
