"""Products: their bits do not depend on how they are laid out, and layouts fit their chips.

Without a GPU the kernels run in Triton's interpreter (`tests/conftest.py`), with one they run
compiled.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from model.kernels.activation import silu_mul
from model.kernels.matmul import multiply
from model.kernels.shared_memory import MARGIN, stages_within
from model.kernels.tiling import (
    INPUTS,
    Layout,
    Tiling,
    layout_for,
    layout_sizes,
    part_size,
    tile_for_whole,
    tiling_for,
)
from model.packed_weights import PackedWeight, to_float8
from tests.support.builders import DEVICE, HALF, at_length, noise

pytestmark = pytest.mark.slow

LIMITS = [99 * 1024, 163 * 1024, 227 * 1024]  # sm_86, 89 and 120; sm_80; sm_90 and 100
SHAPES = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (6144, 4096), (4096, 14336)]
SHAPES += [(28672, 4096), (100, 5000), (64, 64)]
COUNTS = [84, 108, 132, 148]  # multiprocessors


@pytest.mark.parametrize("rows", [1, 5])
def test_parts_add_up_to_the_bits_of_the_whole(rows: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = noise(rows, 700), noise(70, 700), noise(70)
    apart = multiply(x, weight, bias)
    whole = torch.full((rows, 70), torch.nan, device=DEVICE)
    multiply(x, weight, bias, out_MN=whole)
    assert apart.num_parts == 2
    assert torch.equal(apart.sum_parts(torch.float32), whole)


@pytest.mark.usefixtures("one_order")
def test_no_bit_depends_on_the_rows_or_the_tiling() -> None:
    torch.manual_seed(0)
    x, weight = noise(40, 600), noise(70, 600)
    expected = multiply(x, weight).sum_parts(torch.float32)
    for row in (0, 17, 39):
        alone = multiply(x[row : row + 1], weight).sum_parts(torch.float32)
        assert torch.equal(alone, expected[row : row + 1])
    for tiling in (tiling_for(1), tiling_for(64), Tiling(16, 128, 4, 2)):
        assert torch.equal(multiply(x, weight, tiling=tiling).sum_parts(torch.float32), expected)


def test_parts_follow_from_the_weight_alone() -> None:
    """Both models of the benchmarks fill the chip when a single row is computed."""
    assert part_size(4096, 1024) == 256  # Qwen3-0.6B: QKV, out, gate-up, down
    assert part_size(1024, 2048) == 256
    assert part_size(6144, 1024) == 384
    assert part_size(1024, 3072) == 256
    assert part_size(151936, 1024) == 1024
    assert part_size(28672, 4096) == 4096
    for N, K in ((64, 64), (100, 5000), (4096, 14336)):
        assert part_size(N, K) % 128 == 0
        assert math.ceil(K / part_size(N, K)) <= 16


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("rows", [65, *at_length(130)])
def test_every_layout_has_the_bits_of_every_other(rows: int) -> None:
    """All tiles of any chip, with parts in memory and without, rows alone and together."""
    torch.manual_seed(rows)
    x, weight, bias = (noise(*shape, dtype=HALF) for shape in ((rows, 520), (65, 520), (65,)))
    expected = torch.full((rows, 65), torch.nan, device=DEVICE)
    multiply(x, weight, bias, out_MN=expected)
    tilings = {layout.tiling for layout in all_layouts(65, 520)}
    assert len(tilings) == 6
    for tiling in tilings:
        apart = multiply(x, weight, bias, tiling=tiling)
        assert apart.num_parts == 2
        assert torch.equal(apart.sum_parts(torch.float32), expected)
        whole = torch.full((rows, 65), torch.nan, device=DEVICE)
        multiply(x, weight, bias, out_MN=whole, tiling=tiling)
        assert torch.equal(whole, expected)
    alone = torch.full((1, 65), torch.nan, device=DEVICE)
    multiply(x[-1:], weight, bias, out_MN=alone)
    assert torch.equal(alone, expected[-1:])


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("rows", [3, *at_length(130)])
@pytest.mark.parametrize("width", [8, 75])
def test_a_gated_product_has_the_bits_of_two_kernels(rows: int, width: int) -> None:
    """In every tile of any chip: the product in parts or whole, then its activation. The width of
    the MLP fills no tile, so that some have rows of up in the lanes of gate.
    """
    torch.manual_seed(rows)
    N = 2 * width
    x, weight, bias = (noise(*shape, dtype=HALF) for shape in ((rows, 520), (N, 520), (N,)))
    weight /= math.sqrt(520)
    for bias_N in (bias, None):
        expected = silu_mul(multiply(x, weight, bias_N), dtype=HALF)
        assert expected.abs().max() > 1
        for tiling in {layout.tiling for layout in all_layouts(N, 520)}:
            given = multiply(x, weight, bias_N, gated=True, tiling=tiling)
            assert given.is_activated
            assert torch.equal(silu_mul(given, dtype=HALF), expected)
    packed = to_float8(weight)
    given = multiply(x, packed.values_NK, scales=packed.scales, gated=True)
    expected = silu_mul(multiply(x, packed.to(HALF)), dtype=HALF)
    assert torch.equal(given.values, expected)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="an instruction has an order of its own")
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("bias", [False, True])
def test_the_order_of_sums_is_the_documented_one(bias: bool) -> None:
    """Tiles of K in order per part, from zero; bias and parts in order. Else KERNEL_VERSION."""
    torch.manual_seed(1)
    x, weight, bias_N = noise(3, 1000), noise(70, 1000), noise(70)
    part = part_size(70, 1000)
    assert (part, INPUTS) == (384, 128)
    total = (bias_N if bias else torch.zeros(70)).expand(3, 70)
    for start in range(0, 1000, part):
        chain = torch.zeros(3, 70)
        for first in range(start, min(start + part, 1000), INPUTS):
            inputs = slice(first, min(first + INPUTS, 1000))
            product = x[:, inputs].double() @ weight[:, inputs].double().T
            chain = chain + product.float()
        total = total + chain
    given = torch.full((3, 70), torch.nan)
    multiply(x, weight, bias_N if bias else None, out_MN=given)
    assert torch.equal(given, total)


def all_layouts(outputs: int, inputs: int) -> set[Layout]:
    """What steps of up to 2,048 rows have on chips of every size."""
    return {
        layout_for(rows, outputs, inputs, limit=limit, multiprocessors=count)
        for rows in layout_sizes(2048)
        for limit in LIMITS
        for count in COUNTS
    } | {
        Layout(tiling_for(rows, limit=limit), is_apart=False)
        for rows in layout_sizes(2048)
        for limit in LIMITS
    }


@pytest.mark.parametrize("limit", LIMITS)
def test_every_layout_fits_the_shared_memory_of_its_gpu(limit: int) -> None:
    """Two stages at least, or loads wait for products."""
    for rows in layout_sizes(2048):
        chosen = {
            layout_for(rows, *shape, limit=limit, multiprocessors=count).tiling
            for shape in SHAPES
            for count in COUNTS
        }
        for tiling in chosen | {tiling_for(rows, limit=limit)}:
            stage = tiling.stage_bytes(2)
            stages = stages_within(limit, stage=stage, most=tiling.stages)
            assert 2 <= stages <= tiling.stages
            assert stages * stage + MARGIN <= limit


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("limit", LIMITS)
def test_layouts_change_where_the_warm_up_looks(limit: int, count: int) -> None:
    """One variant is compiled per range of rows; another one would be compiled in traffic."""
    sizes = layout_sizes(2048)
    chip: Any = {"limit": limit, "multiprocessors": count}
    for shape in SHAPES:
        for first, after in zip(sizes, [*sizes[1:], 2049], strict=True):
            expected = layout_for(first, *shape, **chip), tile_for_whole(first, *shape, **chip)
            for rows in {(first + after) // 2, after - 1}:
                assert layout_for(rows, *shape, **chip) == expected[0]
                assert tile_for_whole(rows, *shape, **chip) == expected[1]
                assert tiling_for(rows, limit=limit) == tiling_for(first, limit=limit)


def test_tiles_of_many_rows_fill_a_wave() -> None:
    """Qwen3-0.6B's QKV once wrote 4 parts of 256 rows to memory, by 64 programs at a time."""
    for rows, tile in ((128, (64, 64)), (256, (128, 64))):
        tiling, apart = layout_for(rows, 4096, 1024, multiprocessors=132)
        assert (tiling.rows, tiling.outputs, apart) == (*tile, False)
        assert tiling.tiles(rows, 4096) == 128
    assert layout_for(2048, 1024, 3072).is_apart is False  # 128 tiles, which wrote 12 parts
    assert layout_for(64, 1024, 3072).is_apart  # 16 tiles alone would leave a chip idle
    assert layout_for(128, 1024, 3072).is_apart
    few = layout_for(256, 4096, 1024, multiprocessors=32)
    assert few.tiling.tiles(256, 4096) == 64  # a chip of two full waves


def test_float8_becomes_what_torch_has_for_it() -> None:
    """All bits but NaN, subnormals among them, in any dtype of x."""
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    bits[[0x7F, 0xFF]] = 0
    weight = bits.view(2, 128).view(torch.float8_e4m3fn).to(DEVICE)
    for dtype in (torch.float32, HALF):
        one = torch.eye(128, dtype=dtype, device=DEVICE)
        given = torch.full((128, 2), torch.nan, dtype=dtype, device=DEVICE)
        multiply(one, weight, scales=torch.ones(2, device=DEVICE), out_MN=given)
        assert torch.equal(given.T.cpu(), weight.cpu().float().to(dtype))


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("rows", [1, 20, *at_length(70)])
def test_float8_has_the_bits_of_rounded_weights(rows: int, dtype: torch.dtype) -> None:
    """However it is laid out: scales are powers of two."""
    torch.manual_seed(rows)
    x, weight = noise(rows, 520, dtype=dtype), noise(70, 520, dtype=dtype) / 20
    weight[3] = 0
    weight[4] *= 100
    bias = noise(70, dtype=dtype) if rows == 20 else None
    packed = to_float8(weight)
    expected = multiply(x, packed.to(dtype), bias).sum_parts(dtype)
    given = multiply(x, packed.values_NK, bias, scales=packed.scales)
    assert given.num_parts == 2
    assert torch.equal(given.sum_parts(dtype), expected)
    whole = torch.full_like(expected, torch.nan)
    multiply(x, packed.values_NK, bias, scales=packed.scales, out_MN=whole)
    assert torch.equal(whole, expected)


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("rows", [1, 20, *at_length(70)])
def test_blocks_have_the_bits_of_unpacked_weights(rows: int, dtype: torch.dtype) -> None:
    """Also of inputs that fill no tile; every value of a byte is there."""
    torch.manual_seed(rows)
    x = noise(rows, 544, dtype=dtype)
    values = torch.arange(70 * 544).view(70, 544) * 7 % 256 - 128
    packed = PackedWeight(values.to(device=DEVICE, dtype=torch.int8), noise(70, 17).half() / 999)
    expected = multiply(x, packed.to(dtype)).sum_parts(dtype)
    given = multiply(x, packed.values_NK, scales=packed.scales)
    assert given.num_parts == 2
    assert torch.equal(given.sum_parts(dtype), expected)
    whole = torch.full_like(expected, torch.nan)
    multiply(x, packed.values_NK, scales=packed.scales, out_MN=whole)
    assert torch.equal(whole, expected)
