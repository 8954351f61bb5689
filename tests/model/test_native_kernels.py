"""The native kernels against NumPy, bit by bit, in every variant this machine can run."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from model.batch import Floats
from model.config import ModelConfig
from model.native.library import NativeLibrary, NativeModel, Shape
from model.native.quantize import hadamard_block, power_of_two_in, residual_rotation

SHAPES = [(1, 32, 64), (3, 5, 7), (12, 33, 64), (13, 64, 100), (33, 96, 192), (70, 40, 576)]


def product_twin(weight_NK: Floats, x_MK: Floats, bias_N: Floats) -> Floats:
    """8-bit weights a row of W, 8-bit activations a row of x, exact sums, then float32."""
    one = np.float32(1.0)
    w_scale = np.abs(weight_NK).max(1) / np.float32(127)
    w_codes = np.rint(weight_NK * (np.float32(127) / np.abs(weight_NK).max(1))[:, None])
    most = np.abs(x_MK).max(1)
    x_scale = most * (one / np.float32(127))
    x_codes = np.rint(x_MK * (np.float32(127) / most)[:, None])
    sums = x_codes.astype(np.int64) @ w_codes.astype(np.int64).T
    y_MN: Floats = sums.astype(np.float32) * (x_scale[:, None] * w_scale) + bias_N
    return y_MN


def test_a_product_is_the_same_in_every_variant(native_library: NativeLibrary) -> None:
    rng = np.random.default_rng(0)
    for rows, outputs, inputs in SHAPES:
        weight = rng.standard_normal((outputs, inputs), np.float32)
        x = rng.standard_normal((rows, inputs), np.float32)
        bias = rng.standard_normal(outputs, np.float32)
        twin = product_twin(weight, x, bias)
        for variant in native_library.variants:
            y = native_library.product(weight, x, variant=variant, bias_N=bias)
            assert np.array_equal(y, twin), (variant, rows, outputs, inputs)


def test_sums_do_not_saturate(native_library: NativeLibrary) -> None:
    """All codes at their limits, with every pattern of signs of four: 16-bit sums would clip.

    Each instruction adds the products of two or four neighbouring inputs, so the patterns contain
    the largest and the smallest sums that it can meet.
    """
    inputs = 4096
    patterns = np.array([*product((1, -1), repeat=4)], np.float32)
    weight, x = np.tile(patterns, (2, inputs // 4)), np.tile(patterns, inputs // 4)
    twin = product_twin(weight, x, np.zeros(len(weight), np.float32))
    assert np.abs(twin).max() == inputs
    for variant in native_library.variants:
        assert np.array_equal(native_library.product(weight, x, variant=variant), twin), variant


def test_a_row_that_is_not_finite_gives_no_number(native_library: NativeLibrary) -> None:
    """One bad element spoils its row and no other."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((40, 64), np.float32)
    x = rng.standard_normal((3, 64), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 17] = bad
        for variant in native_library.variants:
            y = native_library.product(weight, x, variant=variant)
            assert np.isnan(y[1]).all(), variant
            assert np.isfinite(y[[0, 2]]).all(), variant


def test_zeros_stay_zeros(native_library: NativeLibrary) -> None:
    zeros = np.zeros((2, 64), np.float32)
    for variant in native_library.variants:
        y = native_library.product(zeros, zeros, variant=variant)
        assert np.array_equal(y, np.zeros((2, 2), np.float32))


def hadamard(size: int) -> Floats:
    """Sylvester's matrix, normalised."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    normalised: Floats = (matrix / np.sqrt(size)).astype(np.float32)
    return normalised


@pytest.mark.parametrize("size", [32, 48, 96, 576])
def test_the_residual_rotation_is_orthogonal_and_spreads(size: int) -> None:
    r = residual_rotation(size)
    matrix = np.kron(r.mix, hadamard(r.power)) * r.signs
    assert np.allclose(matrix @ matrix.T, np.eye(size), atol=1e-5)
    assert np.abs(matrix).max() < 1 / np.sqrt(r.power) + 1e-6
    again = residual_rotation(size)
    assert np.array_equal(r.mix, again.mix)
    assert np.array_equal(r.signs, again.signs)


@pytest.mark.parametrize("axis", [0, 1])
def test_rotate_is_a_product_with_the_matrix(
    native_library: NativeLibrary, tiny_shape: Shape, axis: int
) -> None:
    rng = np.random.default_rng(2)
    r = residual_rotation(48)
    matrix = np.kron(r.mix, hadamard(r.power)) * r.signs
    outcomes = []
    for variant in native_library.variants:
        model = NativeModel(native_library, tiny_shape, variant=variant)
        w = rng.standard_normal((96, 48) if axis else (48, 37), np.float32)
        twin = w @ matrix.T if axis else matrix @ w
        model.rotate(w, axis=axis, power=r.power, odd=r.odd, signs=r.signs, mix=r.mix)
        model.close()
        assert np.allclose(w, twin, atol=1e-5)
        rng = np.random.default_rng(2)
        outcomes.append(w)
    assert all(np.array_equal(w, outcomes[0]) for w in outcomes)


def test_blocks_of_a_transform_divide_the_width() -> None:
    widths = (48, 1536, 4864, 8960, 14336)
    assert [hadamard_block(width) for width in widths] == [16, 512, 256, 256, 512]
    assert all(width % hadamard_block(width) == 0 for width in widths)
    assert power_of_two_in(576) == 64


def test_a_model_that_no_variant_runs_is_refused(
    native_library: NativeLibrary, tiny_shape: Shape, tiny_config: ModelConfig
) -> None:
    from model.native import NativeUnavailable

    assert tiny_config.num_layers == tiny_shape.layers
    with pytest.raises(NativeUnavailable, match="cannot run the variant"):
        NativeModel(native_library, tiny_shape, variant="abacus")


def test_every_variant_has_a_peak(native_library: NativeLibrary) -> None:
    """Also of one that this machine cannot run: 0."""
    probe = native_library.calls.quire_probe_products
    assert all(probe(variant.encode(), 2, 1) > 0 for variant in native_library.variants)
    assert probe(b"abacus", 1, 1) == 0
    assert native_library.calls.quire_probe_memory(2, 2**20, 1) > 0
