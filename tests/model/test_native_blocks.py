"""Weights in 4 bits: products against NumPy bit by bit in every variant, and whole runners."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import Floats
from model.config import ModelConfig
from model.native.library import Bytes, NativeLibrary
from model.runners import RunnerOptions
from model.runners.exactness import ExactnessCheck, check_exactness
from model.runners.native import NativeRunner
from model.runners.torch import TorchRunner
from tests.support.builders import Piece, make_batch, tiny_weights
from tests.support.weights import dequantized

BLOCK = 32
SHAPES = [(1, 32, 32), (2, 5, 96), (3, 33, 64), (4, 70, 160), (7, 40, 576), (13, 64, 1536)]


def made_blocks(rng: np.random.Generator, outputs: int, inputs: int) -> Bytes:
    """Random blocks of GGUF's type Q4_1, [outputs, inputs / 32 * 20]."""
    blocks = rng.integers(0, 256, (outputs, inputs // BLOCK, 20), np.uint8)
    scales = rng.standard_normal((outputs, inputs // BLOCK, 2)).astype(np.float16)
    blocks[..., :4] = scales.view(np.uint8)
    return blocks.reshape(outputs, -1)


def parts_of(blocks_NB: Bytes) -> tuple[Floats, Floats, Floats]:
    """Codes [N, blocks, 32], scales and minima [N, blocks]."""
    blocks = blocks_NB.reshape(len(blocks_NB), -1, 20)
    halves = np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
    return codes.astype(np.float32), halves[..., 0], halves[..., 1]


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded once; in double precision, where the product of two floats is exact."""
    y: Floats = (a.astype(np.float64) * b + c).astype(np.float32)
    return y


def product_twin(blocks_NB: Bytes, x_MK: Floats, bias_N: Floats) -> Floats:
    """Codes and a scale per 32 activations, exact sums of a block, blocks in order in float32."""
    codes, scale_NG, minimum_NG = parts_of(blocks_NB)
    x = x_MK.reshape(len(x_MK), -1, BLOCK)
    most = np.abs(x).max(-1)
    x_scale = most * (np.float32(1) / np.float32(127))
    x_codes = np.rint(x * (np.float32(127) / most)[..., None])
    x_total = x_scale * x_codes.sum(-1)
    y_MN = np.zeros((len(x), len(codes)), np.float32)
    for g in range(x.shape[1]):
        whole = x_codes[:, g] @ codes[:, g].T
        y_MN = fma(whole * scale_NG[:, g], x_scale[:, g, None], y_MN)
        y_MN = fma(minimum_NG[None, :, g], x_total[:, g, None], y_MN)
    y: Floats = y_MN + bias_N
    return y


def test_a_product_is_the_same_in_every_variant(native_library: NativeLibrary) -> None:
    rng = np.random.default_rng(0)
    for rows, outputs, inputs in SHAPES:
        blocks = made_blocks(rng, outputs, inputs)
        x = rng.standard_normal((rows, inputs), np.float32)
        bias = rng.standard_normal(outputs, np.float32)
        twin = product_twin(blocks, x, bias)
        for variant in native_library.variants:
            y = native_library.block_product(blocks, x, variant=variant, bias_N=bias)
            assert np.array_equal(y, twin), (variant, rows, outputs, inputs)


def test_a_row_does_not_depend_on_those_beside_it(native_library: NativeLibrary) -> None:
    rng = np.random.default_rng(1)
    blocks = made_blocks(rng, 64, 160)
    x = rng.standard_normal((17, 160), np.float32)
    for variant in native_library.variants:
        alone = [
            native_library.block_product(blocks, x[i : i + 1], variant=variant) for i in range(17)
        ]
        for count in range(1, 18):
            y = native_library.block_product(blocks, x[:count], variant=variant)
            assert np.array_equal(y, np.concatenate(alone[:count])), (variant, count)


def test_sums_do_not_saturate(native_library: NativeLibrary) -> None:
    """The largest weights and codes of both signs: 16 bits just hold the sum of a block."""
    patterns = np.array([*product((1, -1), repeat=4)], np.float32)
    x = np.tile(patterns, 8)
    blocks = np.full((32, 20), 255, np.uint8)
    blocks[:, :4] = np.array([1, 0], np.float16).view(np.uint8)
    twin = product_twin(blocks, x, np.zeros(32, np.float32))
    assert np.abs(twin).max() == np.float32(15 * 32)
    for variant in native_library.variants:
        assert np.array_equal(native_library.block_product(blocks, x, variant=variant), twin)


@pytest.mark.parametrize("half", [6e-8, 1e-6, 6.1e-5, 65504.0, -3e-7, 0.0])
def test_every_half_is_read_exactly(native_library: NativeLibrary, half: float) -> None:
    blocks = np.zeros((1, 20), np.uint8)
    blocks[:, :4] = np.array([0, half], np.float16).view(np.uint8)
    x = np.zeros((1, BLOCK), np.float32)
    x[0, 3] = 1
    twin = product_twin(blocks, x, np.zeros(1, np.float32))
    for variant in native_library.variants:
        assert native_library.block_product(blocks, x, variant=variant) == twin


def test_a_block_that_is_not_finite_gives_no_number(native_library: NativeLibrary) -> None:
    """One bad element spoils its row and no other; a block of zeros is none."""
    rng = np.random.default_rng(2)
    blocks = made_blocks(rng, 40, 96)
    x = rng.standard_normal((3, 96), np.float32)
    x[0, :BLOCK] = 0
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 40] = bad
        for variant in native_library.variants:
            y = native_library.block_product(blocks, x, variant=variant)
            assert np.isnan(y[1]).all(), variant
            assert np.isfinite(y[[0, 2]]).all(), variant


def in_blocks(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights with matrices of layers in blocks of 4 bits."""
    return {
        name: torch.from_numpy(quantised(tensor.numpy())) if is_matrix(name, tensor) else tensor
        for name, tensor in weights.items()
    }


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith("blocks.") and tensor.ndim == 2


def quantised(weight_NK: Floats) -> Bytes:
    groups = weight_NK.reshape(len(weight_NK), -1, BLOCK)
    low, high = groups.min(-1), groups.max(-1)
    halves = np.stack([(high - low) / 15, low], axis=-1).astype(np.float16)
    scale, minimum = (
        halves.astype(np.float32)[..., 0, None],
        halves.astype(np.float32)[..., 1, None],
    )
    codes = np.clip(np.rint((groups - minimum) / scale), 0, 15).astype(np.uint8)
    packed = codes[..., :16] | codes[..., 16:] << 4
    blocks = np.concatenate([halves.view(np.uint8), packed], axis=-1)
    return blocks.reshape(len(weight_NK), -1)


def as_floats(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Blocks as the numbers that they stand for."""
    return {
        name: torch.from_numpy(dequantized(tensor.numpy()))
        if tensor.dtype == torch.uint8
        else tensor
        for name, tensor in weights.items()
    }


def score(runner: NativeRunner | TorchRunner, text: list[int]) -> Floats:
    """Log probabilities of token 5 after each token of a text."""
    count = len(text)
    scores = dict.fromkeys(range(count), 5)
    own = list(range(-(-count // runner.block_size)))
    piece = Piece(tokens=text, blocks=own, count=count, sample=False, scores=scores)
    return runner.run(make_batch([piece])).score_logprobs_Q


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": True, "qk_norm": True},
        {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "qkv_bias": True},
    ],
    ids=["llama", "tied, norms of heads", "odd hidden size, biases"],
)
def test_four_bits_are_near_the_reference(
    changes: dict[str, Any],
    native_config: Callable[..., ModelConfig],
    native: Callable[..., NativeRunner],
) -> None:
    """The reference has the weights of the same blocks: only activations are rounded."""
    config = native_config(**changes)
    weights = in_blocks(tiny_weights(config))
    options = RunnerOptions(dtype="float32", num_blocks=160)
    reference = TorchRunner(config, as_floats(weights), options=options, digest="0" * 64)
    text = np.random.default_rng(3).integers(0, config.vocab_size, 200).tolist()
    exact = score(reference, text)
    found = score(native(config, weights, dtype="int4", kv_dtype="bfloat16"), text)
    assert np.sqrt(np.mean((found - exact) ** 2)) / exact.std() < 0.05


@pytest.mark.slow
def test_every_way_through_every_variant_gives_the_same_bits_in_four_bits(
    native_config: Callable[..., ModelConfig],
    native: Callable[..., NativeRunner],
    native_variants: list[str],
) -> None:
    """Alone, in a batch, chunked, cached and recomputed; by any number of threads."""
    config = native_config(max_model_len=512)
    weights = in_blocks(tiny_weights(config))
    trial = ExactnessCheck(prompt=70, answer=4, beside=(2, 9), chunks=(1, 7, 64))
    text = np.random.default_rng(4).integers(0, config.vocab_size, 100).tolist()
    scores = []
    for threads, variant in product((1, 2), native_variants):
        runner = native(
            config, weights, variant=variant, num_threads=threads, num_blocks=100, dtype="int4"
        )
        found = check_exactness(runner, trial)
        assert all(found.values()), (variant, found)
        scores.append(score(runner, text))
    assert all(np.array_equal(one, scores[0]) for one in scores)


def test_four_bits_are_a_class_of_their_own(
    native_config: Callable[..., ModelConfig], native: Callable[..., NativeRunner]
) -> None:
    config = native_config()
    weights = tiny_weights(config)
    narrow = native(config, in_blocks(weights), dtype="int4")
    assert narrow.numeric_class.startswith("native-int4-kv8-v")
    assert native(config, weights, dtype="int8").numeric_class.startswith("native-int8-kv8-v")
    for dtype, given in (("int8", in_blocks(weights)), ("int4", weights)):
        with pytest.raises(ValueError, match="needs weights in blocks"):
            native(config, given, dtype=dtype)
