"""Adapters at run time: applied equals merged, a batch of several equals each alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.adapters import Adapter, rows_of_adapters
from model.checkpoint import CheckpointError, load_model
from model.checkpoint.adapters import CONFIG, MAX_RANK, WEIGHTS, read_adapter
from model.parallel.ranks import check_ranks
from model.runners import Runner, RunnerOptions
from model.runners.torch import TorchRunner
from model.training.folder import as_stored, write_model
from model.training.lowrank import (
    LowRank,
    adapters_of,
    add_adapters,
    merged_weights,
    write_adapter,
)
from model.training.network import build_network
from tests.model.test_native_blocks import as_floats, in_blocks
from tests.model.training_models import tiny_base
from tests.support.builders import Piece, make_batch, tiny_model_config

TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "v_proj"),
    "qwen3": ("k_proj", "o_proj", "down_proj", "gate_proj"),
    "smollm3": ("all-linear",),
    "gpt2": ("c_attn", "c_fc"),
}
Written = tuple[Path, Path, dict[str, torch.Tensor]]
"""A base's folder, an adapter's, and the merged weights."""


def written(folder: Path, family: str, shape: LowRank, *, seed: int = 1, **sizes: int) -> Written:
    """A base, and an adapter of it with random factors. The base is the same for all seeds."""
    base = tiny_base(family, **sizes)
    tensors = as_stored(base.family, base.config, base.weights)
    write_model(folder / family, fields=base.fields, tensors=tensors, vocabulary=None)
    network = build_network(base.config, {n: w.clone() for n, w in base.weights.items()})
    add_adapters(network, base, shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters_of(network):
            adapter.b.normal_(std=0.3, generator=generator)
    out = folder / f"{family}-{seed}"
    write_adapter(out, network, shape, base="somewhere")
    return folder / family, out, merged_weights(network)


def torch_runner(
    model: Path, *adapters: Adapter, weights: dict[str, torch.Tensor] | None = None
) -> Runner:
    loaded = load_model(model)
    options = RunnerOptions(
        dtype="float32", device="cpu", block_size=4, num_blocks=64, adapters=adapters
    )
    given = loaded.weights if weights is None else weights
    return TorchRunner(loaded.config, given, options=options, digest="0" * 64)


Answer = tuple[list[int], list[float]]  # tokens, log probabilities


def answers(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[int],
    *,
    count: int = 5,
    chunk: int = 100,
) -> list[Answer]:
    """Greedy answers to prompts with these adapters, all in one batch."""
    texts, logprobs = [list(prompt) for prompt in prompts], [list[float]() for _ in prompts]
    computed, size = [0] * len(prompts), max(1, 32 // runner.block_size)
    while any(len(each) < count for each in logprobs):
        pieces = []
        for index, text in enumerate(texts):
            end = min(len(text), computed[index] + chunk)
            pieces.append(
                Piece(
                    tokens=text[:end],
                    count=end - computed[index],
                    blocks=range(size * index, size * index + size),
                    sample=end == len(text),
                    adapter=adapters[index],
                    sampling={"logprobs": True},
                )
            )
            computed[index] = end
        batch = make_batch(pieces)
        batch.check(block_size=runner.block_size, num_blocks=runner.num_blocks, vocab_size=97)
        output = runner.run(batch)
        sampled = [index for index, piece in enumerate(pieces) if piece.sample]
        for row, index in enumerate(sampled):
            texts[index].append(int(output.tokens_R[row]))
            logprobs[index].append(float(output.logprobs_R[row]))
    return [
        (text[len(prompt) : len(prompt) + count], found[:count])
        for text, prompt, found in zip(texts, prompts, logprobs, strict=True)
    ]


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(97) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("family", TARGETS)
def test_applied_equals_merged(family: str, tmp_path: Path) -> None:
    """Tokens and log probabilities, with each family's names, fused matrices and transposes."""
    shape = LowRank(rank=3, alpha=5.0, targets=TARGETS[family])
    model, folder, merged = written(tmp_path, family, shape)
    prompts = prompts_of(9, 1, 14)
    applied = answers(torch_runner(model, read_adapter(folder, model)), prompts, [1, 1, 1])
    expected = answers(torch_runner(model, weights=merged), prompts, [0, 0, 0])
    plain = answers(torch_runner(model), prompts, [0, 0, 0])
    for (ids, found), (other_ids, other), (_, without) in zip(
        applied, expected, plain, strict=True
    ):
        assert ids == other_ids
        np.testing.assert_allclose(found, other, atol=1e-3)
        assert np.abs(np.array(found) - without).max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [3, 100])
def test_several_adapters_in_a_batch_are_each_alone(chunk: int, tmp_path: Path) -> None:
    """Within the rounding of the torch runner, and rows without an adapter as if there were none;
    prompts are cut into chunks, and adapters adapt different matrices.
    """
    targets = [("q_proj", "v_proj"), ("all-linear",), ("down_proj",)]
    shapes = [LowRank(rank=2 + i, targets=each) for i, each in enumerate(targets)]
    made = [written(tmp_path, "llama", shape, seed=i) for i, shape in enumerate(shapes, start=1)]
    model = made[0][0]
    adapters = [read_adapter(folder, model) for _, folder, _ in made]
    prompts, numbers = prompts_of(9, 2, 14, 5, 7, 3), [1, 0, 3, 2, 1, 0]
    together = answers(torch_runner(model, *adapters), prompts, numbers, chunk=chunk)
    for prompt, number, (ids, found) in zip(prompts, numbers, together, strict=True):
        only = [adapters[number - 1]] if number else []
        ((alone_ids, alone),) = answers(torch_runner(model, *only), [prompt], [min(number, 1)])
        assert ids == alone_ids
        np.testing.assert_allclose(found, alone, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_rows_follow_their_sequences(seed: int) -> None:
    draw = random.Random(seed)
    counts = [draw.randint(1, 4) for _ in range(6)]
    numbers = [draw.randint(0, 2) for _ in counts]
    pieces = [
        Piece(tokens=range(count), count=count, blocks=[0], adapter=number)
        for count, number in zip(counts, numbers, strict=True)
    ]
    expected: dict[int, list[int]] = {}
    rows = iter(range(sum(counts)))
    for count, number in zip(counts, numbers, strict=True):
        expected.setdefault(number, []).extend(next(rows) for _ in range(count))
    expected.pop(0, None)
    found = rows_of_adapters(make_batch(pieces))
    assert {number: each.tolist() for number, each in found.items()} == expected


def test_the_digest_is_of_every_byte(tmp_path: Path) -> None:
    shape = LowRank(rank=2)
    model, folder, _ = written(tmp_path, "llama", shape)
    first = read_adapter(folder, model).digest
    assert read_adapter(folder, model).digest == first
    _, other, _ = written(tmp_path, "llama", shape, seed=2)
    assert read_adapter(other, model).digest != first
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | {"lora_alpha": 3}))
    assert read_adapter(folder, model).digest != first


Spoil = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config, _: config.update(peft_type="IA3"), "peft_type must be LORA"),
        (lambda config, _: config.update(use_dora=True), "use_dora is not supported"),
        (lambda config, _: config.update(bias="all"), "bias must be none"),
        (lambda config, _: config.update(r=MAX_RANK + 1), f"r must be from 1 to {MAX_RANK}"),
        (lambda config, _: config.update(r="8"), f"r must be from 1 to {MAX_RANK}"),
        (lambda config, _: config.update(lora_alpha="x"), "lora_alpha must be a number"),
        (lambda _, tensors: tensors.clear(), "has no tensors"),
        (lambda _, tensors: tensors.pop(FIRST), "lacks lora_A or lora_B"),
        (lambda _, tensors: tensors[FIRST].fill_(float("nan")), "not finite"),
        (
            lambda _, tensors: tensors.update({FIRST.replace("q_proj", "rotary"): torch.zeros(2)}),
            "possible are down_proj, gate_proj, k_proj",
        ),
        (
            lambda _, tensors: tensors.update({FIRST: torch.zeros(2, 31)}),
            "is of another model: it is for a matrix of 32 x 31, and the model's has 32 x 32",
        ),
        (
            lambda _, tensors: tensors.update({FIRST: torch.zeros(3, 32)}),
            "no product of matrices of a rank up to",
        ),
    ],
    ids=range(12),
)
def test_what_cannot_be_applied_is_refused(spoil: Spoil, message: str, tmp_path: Path) -> None:
    model, folder, _ = written(tmp_path, "llama", LowRank(rank=2))
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    spoil(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, model)


def test_adapters_of_another_model_or_none_are_refused(tmp_path: Path) -> None:
    model, _, _ = written(tmp_path, "llama", LowRank(rank=2))
    _, other, _ = written(tmp_path, "gpt2", LowRank(rank=2))
    with pytest.raises(CheckpointError, match="adapts what cannot be adapted here"):
        read_adapter(other, model)
    with pytest.raises(CheckpointError, match="adapter_config"):
        read_adapter(model, model)


def test_tensor_parallelism_refuses_adapters_in_one_line(tmp_path: Path) -> None:
    model, folder, _ = written(tmp_path, "llama", LowRank(rank=2))
    options = RunnerOptions(device="cpu", adapters=(read_adapter(folder, model),))
    config = tiny_model_config(head_dim=16)
    with pytest.raises(ValueError, match="tensor parallelism does not apply adapters"):
        check_ranks(2, runner="torch", config=config, options=options)


NATIVE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
SHAPES = (
    LowRank(rank=2, targets=("q_proj", "v_proj")),
    LowRank(rank=5, targets=("all-linear",)),
    LowRank(rank=3, targets=("k_proj", "o_proj", "up_proj", "down_proj")),
)


@dataclass(frozen=True)
class Native:
    """A model for the native runner, its adapters, and what builds runners with them."""

    model: Path
    adapters: list[Adapter]
    build: Callable[..., Runner]

    def runner(self, *numbers: int, **options: Any) -> Runner:
        """With these adapters."""
        loaded = load_model(self.model)
        adapters = tuple(self.adapters[number - 1] for number in numbers)
        return self.build(loaded.config, loaded.weights, adapters=adapters, **options)


@pytest.fixture
def native_adapters(native: Callable[..., Runner], tmp_path: Path) -> Native:
    made = [
        written(tmp_path, "qwen2", shape, seed=seed, **NATIVE)
        for seed, shape in enumerate(SHAPES, start=1)
    ]
    model = made[0][0]
    adapters = [read_adapter(folder, model) for _, folder, _ in made]
    return Native(model, adapters, native)


def scored(runner: Runner, *, adapter: int = 0) -> np.ndarray[Any, Any]:
    """Log probabilities of the tokens of some texts."""
    found = []
    for text in prompts_of(*[24] * 6):
        scores = dict(enumerate(text[1:]))
        piece = Piece(tokens=text, count=24, blocks=range(24), scores=scores, adapter=adapter)
        found.append(runner.run(make_batch([piece])).score_logprobs_Q)
    return np.concatenate(found)


@pytest.mark.parametrize("dtype", ["auto", "int4"])
@pytest.mark.parametrize("target", ["q", "k", "v", "o", "gate", "up", "down"])
def test_the_native_runner_applies_what_torch_applies(
    target: str, dtype: str, native: Callable[..., Runner], tmp_path: Path
) -> None:
    """Through its rotations, matrix by matrix: an adapter changes its scores as it changes those of
    the reference, up to what 8 or 4 bits cost the model anyway.
    """
    shape = LowRank(rank=3, alpha=40.0, targets=(f"{target}_proj",))
    model, folder, _ = written(tmp_path, "qwen2", shape, **NATIVE)
    loaded, adapter = load_model(model), read_adapter(folder, model)
    weights = in_blocks(loaded.weights) if dtype == "int4" else loaded.weights
    held = as_floats(weights) if dtype == "int4" else weights
    options = RunnerOptions(
        dtype="float32", device="cpu", block_size=4, num_blocks=64, adapters=(adapter,)
    )
    reference = TorchRunner(loaded.config, held, options=options, digest="0" * 64)
    runner = native(loaded.config, weights, adapters=(adapter,), dtype=dtype)
    changed = scored(reference, adapter=1) - scored(reference)
    error = scored(runner, adapter=1) - scored(runner) - changed
    assert np.sqrt(np.mean(error**2)) < 0.3 * np.sqrt(np.mean(changed**2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "chunk", "variant"), [(2, 100, ""), (1, 3, ""), (3, 7, "portable")]
)
def test_in_a_batch_of_several_every_bit_is_as_alone(
    threads: int, chunk: int, variant: str, native_adapters: Native
) -> None:
    """Also of rows without an adapter: as in a runner that has none."""
    prompts, numbers = prompts_of(9, 2, 14, 5, 7, 3, 1), [1, 0, 3, 2, 1, 0, 2]
    options: dict[str, Any] = {"num_threads": threads, "variant": variant}
    runner = native_adapters.runner(1, 2, 3, **options)
    together = answers(runner, prompts, numbers, chunk=chunk)
    for prompt, number, found in zip(prompts, numbers, together, strict=True):
        alone = native_adapters.runner(*[number] if number else [])
        assert answers(alone, [prompt], [min(number, 1)]) == [found]


def test_the_native_runner_knows_its_adapters(native_adapters: Native) -> None:
    runner = native_adapters.runner(1)
    batch = make_batch([Piece(tokens=[1], blocks=[0], adapter=2)])
    with pytest.raises(ValueError, match="an adapter that is not loaded"):
        runner.run(batch)
