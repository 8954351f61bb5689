"""Weights of 8 bits: rounding to float8 has the error of e4m3 and no other; whole runners."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.packed_weights import RoundedWeights, from_blocks, is_matrix, to_float8
from model.runners import RunnerOptions
from tests.support.builders import Piece, make_batch, tiny_model_config, tiny_weights


def rows_of_any_scale(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randint(-60, 60, (9, 1), generator=generator)
    weight = torch.randn(9, 40, generator=generator)
    return torch.ldexp(weight, scale) * (torch.rand(9, 40, generator=generator) > 0.1)


@pytest.mark.parametrize("seed", range(8))
def test_a_weight_is_rounded_to_the_nearest(seed: int) -> None:
    """Half a unit of 3 bits of mantissa, or of the least number that a row has."""
    weight = rows_of_any_scale(seed)
    packed = to_float8(weight)
    error = (packed.to(torch.float32) - weight).abs()
    least = packed.scales[:, None] * 2.0**-10
    assert (error <= torch.maximum(weight.abs() * 2.0**-4, least)).all()
    used = packed.values_NK.float().abs().amax(dim=1)
    assert (used > 200).all()  # the upper half of what e4m3 has, 448 at most


@pytest.mark.parametrize("seed", range(8))
def test_scales_are_powers_of_two_and_cost_nothing(seed: int) -> None:
    """Rounded weights are numbers of bfloat16, stay as they are, and scale with their row."""
    weight = rows_of_any_scale(seed)
    packed = to_float8(weight)
    mantissa, _ = torch.frexp(packed.scales)
    assert (mantissa == 0.5).all()
    rounded = packed.to(torch.float32)
    assert torch.equal(packed.to(torch.bfloat16).float(), rounded)
    assert torch.equal(to_float8(rounded).to(torch.float32), rounded)
    assert torch.equal(to_float8(weight * 2.0**9).to(torch.float32), rounded * 2.0**9)


@pytest.mark.parametrize("largest", [448.0, 448.1, 449.0, 512.0, 224.0, 223.9, 3e38, 1e-42])
def test_no_row_leaves_the_range(largest: float) -> None:
    packed = to_float8(torch.tensor([[largest, -largest, largest / 3], [0.0, 0.0, 0.0]]))
    assert torch.isfinite(packed.values_NK.float()).all()
    given = packed.to(torch.float32)
    assert torch.equal(given[1], torch.zeros(3))
    if largest > 1e-30:
        torch.testing.assert_close(given[0, 0].item(), largest, rtol=2**-4, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite weights: use bfloat16"):
        to_float8(torch.tensor([[1.0, bad]]))


def test_layers_matrices_alone_are_rounded() -> None:
    config = tiny_model_config(qk_norm=True, qkv_bias=True, tied_head=False)
    weights = tiny_weights(config)
    rounded = RoundedWeights(weights)
    assert list(rounded) == list(weights)
    assert len(rounded) == len(weights)
    changed = {name for name in weights if not torch.equal(rounded[name].float(), weights[name])}
    assert changed == {name for name in weights if is_matrix(name)}
    assert len(changed) == 4 * config.num_layers


def blocks_of(weight: torch.Tensor) -> torch.Tensor:
    """A weight in Q8_0, uint8 [N, K / 32 * 34]."""
    parts = weight.float().view(len(weight), -1, 32)
    scales = (parts.abs().amax(-1) / 127).half()
    values = (parts / scales.float().clamp(min=1e-9)[..., None]).round().clamp(-127, 127)
    as_bytes = [scales[..., None].view(torch.uint8), values.to(torch.int8).view(torch.uint8)]
    return torch.cat(as_bytes, dim=-1).flatten(1)


def test_blocks_are_taken_apart_as_the_files_reader_has_them() -> None:
    from model.checkpoint.dequantize import dequantize

    torch.manual_seed(0)
    weight = torch.randn(5, 96)
    blocks = blocks_of(weight)
    expected = dequantize(blocks.view(-1, 34).numpy(), "Q8_0").reshape(5, 96)
    packed = from_blocks(blocks)
    assert packed.values_NK.shape == (5, 96)
    assert packed.scales.shape == (5, 3)
    assert torch.equal(packed.to(torch.float32), torch.from_numpy(expected))
    torch.testing.assert_close(packed.to(torch.float32), weight, atol=0.03, rtol=0)


def built(config: ModelConfig, dtype: str, weights: Any, **arguments: Any) -> Any:
    from model.runners.cuda.build import build_runner

    options = RunnerOptions(
        dtype=dtype, device="cpu", block_size=4, num_blocks=32, max_sequences=4,
        max_batch_tokens=24,
    )  # fmt: skip
    return build_runner(config, weights, options=options, digest="0" * 64, check=None, **arguments)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it refuses float32 on a GPU")
@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize(("dtype", "kind"), [("float8", "fp8"), ("int8", "q8")])
def test_a_runner_has_the_answers_of_unpacked_weights(dtype: str, kind: str) -> None:
    """Every bit of logits, and a numeric class of its own. Interpreted."""
    config = tiny_model_config(
        num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, qkv_bias=True, intermediate_size=64,
        max_model_len=64,
    )  # fmt: skip
    weights = tiny_weights(config)
    stored = dict(weights)
    unpacked: Any = RoundedWeights(weights)
    if dtype == "int8":
        stored |= {name: blocks_of(weights[name]) for name in weights if is_matrix(name)}
        unpacked = weights | {
            name: from_blocks(blocks).to(torch.float32)
            for name, blocks in stored.items()
            if is_matrix(name)
        }
    sampling = {"temperature": 0.8, "seed": 7, "logprobs": True}
    text = [3, 1, 4, 1, 5, 9, 2]
    batch = make_batch(
        [Piece(tokens=text, count=7, blocks=[3, 4], sampling=sampling, scores={0: 1, 3: 5})],
        num_top=5,
        score_num_top=3,
    )
    given = built(config, dtype, stored)
    rounded = built(config, "float32", unpacked)
    plain = built(config, "float32", weights)
    assert f"-{kind}-" in given.numeric_class
    assert f"-{kind}-" not in plain.numeric_class
    outputs = [runner.run(batch) for runner in (given, rounded, plain)]
    bits = [
        [output.top_logprobs_RN.tobytes(), output.score_logprobs_Q.tobytes()] for output in outputs
    ]
    assert bits[0] == bits[1] != bits[2]


def test_what_does_not_fit_a_dtype_is_refused() -> None:
    from model.kernels.matmul import multiply_by_vendor_blas

    config = tiny_model_config(max_model_len=64)
    weights = tiny_weights(config)
    with pytest.raises(ValueError, match="dtype float8 has no product by vendor BLAS"):
        built(config, "float8", weights, product=multiply_by_vendor_blas)
    with pytest.raises(ValueError, match="dtype int8 is for weights in the 8-bit blocks"):
        built(config, "int8", weights)
    blocks = {
        name: blocks_of(weight) if is_matrix(name) else weight
        for name, weight in tiny_weights(tiny_model_config(intermediate_size=64)).items()
    }
    with pytest.raises(ValueError, match="and these for no other"):
        built(tiny_model_config(intermediate_size=64), "float32", blocks)
