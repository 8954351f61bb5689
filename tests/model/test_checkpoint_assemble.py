"""Assembling is strict: names, parts and shapes; splitting, fusing and transposing are exact."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import CheckpointError, Layout, load_model
from model.checkpoint.assemble import AssembledWeights
from model.config import Activation, ModelConfig, Norm, Position
from model.families import Family
from model.weights import Array

CONFIG = ModelConfig(
    family="odd",
    vocab_size=11,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=12,
    max_model_len=9,
    norm=Norm.LAYER,
    position=Position.LEARNED,
    activation=Activation.GELU_TANH,
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied_head=True,
)
FAMILY = Family(
    name="odd",
    model_types=("odd",),
    configure=lambda _: CONFIG,
    names={
        "wte": "embed.weight",
        "wpe": "position.weight",
        "ln.w": "norm.weight",
        "ln.b": "norm.bias",
        "lm_head": "head.weight",
        "h.{i}.mask": None,
        **{
            f"h.{{i}}.{theirs}.{kind[0]}": f"blocks.{{i}}.{ours}.{kind}"
            for theirs, ours in {
                "ln1": "attention_norm",
                "ln2": "mlp_norm",
                "o": "attention.out",
                "up": "mlp.up",
                "down": "mlp.down",
            }.items()
            for kind in ("weight", "bias")
        },
        **{
            f"h.{{i}}.qkv.{kind[0]}": tuple(f"blocks.{{i}}.attention.{p}.{kind}" for p in "qkv")
            for kind in ("weight", "bias")
        },
    },
    transposed=frozenset({"h.{i}.qkv.w", "h.{i}.up.w"}),
)


class MemoryCheckpoint:
    """Arrays in memory under a family's names; notes what was read."""

    tokenizer = Path()
    digest = ""

    def __init__(self, tensors: dict[str, Array]) -> None:
        self.config: dict[str, Any] = {}
        self.tensors = tensors
        self.read: list[str] = []

    def layout(self, family: Family) -> Layout:
        return Layout(names=family.names, transposed=family.transposed)

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def load(self, name: str) -> Array:
        self.read.append(name)
        return self.tensors[name]


def _tensors() -> dict[str, Array]:
    shapes: dict[str, tuple[int, ...]] = {"wte": (11, 8), "wpe": (9, 8), "ln.w": (8,), "ln.b": (8,)}
    for i in range(2):
        shapes |= {f"h.{i}.{ln}.{kind}": (8,) for ln in ("ln1", "ln2") for kind in "wb"}
        shapes |= {f"h.{i}.qkv.w": (8, 16), f"h.{i}.qkv.b": (16,)}
        shapes |= {f"h.{i}.o.w": (8, 8), f"h.{i}.o.b": (8,), f"h.{i}.mask": (3, 3)}
        shapes |= {f"h.{i}.up.w": (8, 12), f"h.{i}.up.b": (12,)}
        shapes |= {f"h.{i}.down.w": (8, 12), f"h.{i}.down.b": (8,)}
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_transposes_and_keeps_fused_parts_in_order() -> None:
    tensors = _tensors()
    weights = AssembledWeights(FAMILY, CONFIG, checkpoint=MemoryCheckpoint(tensors))
    assert np.array_equal(weights["blocks.1.attention.qkv.weight"], tensors["h.1.qkv.w"].T)
    assert np.array_equal(weights["blocks.1.attention.qkv.bias"], tensors["h.1.qkv.b"])
    assert np.array_equal(weights["blocks.0.mlp.up.weight"], tensors["h.0.up.w"].T)
    assert np.array_equal(weights["blocks.0.mlp.down.weight"], tensors["h.0.down.w"])
    assert all(array.flags.c_contiguous for array in weights.values())
    assert "head.weight" not in weights
    assert len(weights) == 4 + 2 * 12


def test_parts_in_another_order_are_put_right() -> None:
    swapped = {
        f"h.{{i}}.qkv.{kind[0]}": tuple(f"blocks.{{i}}.attention.{p}.{kind}" for p in "vqk")
        for kind in ("weight", "bias")
    }
    family = dataclasses.replace(FAMILY, names={**FAMILY.names, **swapped})
    tensors = _tensors()
    weights = AssembledWeights(family, CONFIG, checkpoint=MemoryCheckpoint(tensors))
    v, q, k = np.split(tensors["h.0.qkv.b"], [4, 12])
    assert np.array_equal(weights["blocks.0.attention.qkv.bias"], np.concatenate([q, k, v]))


@pytest.mark.parametrize("name", sorted(set(_tensors()) - {"h.0.mask", "h.1.mask"}))
def test_every_missing_or_misshapen_tensor_is_an_error_before_reading(name: str) -> None:
    tensors = _tensors()
    for shape in ((7,), (8, 7), (8, 8, 1)):
        checkpoint = MemoryCheckpoint(tensors | {name: np.zeros(shape)})
        with pytest.raises(CheckpointError, match="wrong shape"):
            AssembledWeights(FAMILY, CONFIG, checkpoint=checkpoint)
        assert not checkpoint.read
    del tensors[name]
    checkpoint = MemoryCheckpoint(tensors)
    with pytest.raises(CheckpointError, match="missing tensors"):
        AssembledWeights(FAMILY, CONFIG, checkpoint=checkpoint)
    assert not checkpoint.read


@pytest.mark.parametrize("name", ["surprise", "h.01.ln1.w", "h.0.h.0.ln1.w", "h.x.o.w"])
def test_unexpected_tensors_are_an_error(name: str) -> None:
    checkpoint = MemoryCheckpoint(_tensors() | {name: np.zeros(8)})
    with pytest.raises(CheckpointError, match=f"unexpected tensors: {name}"):
        AssembledWeights(FAMILY, CONFIG, checkpoint=checkpoint)
    checkpoint = MemoryCheckpoint(_tensors() | {"h.2.ln1.w": np.zeros(8)})
    with pytest.raises(CheckpointError, match=r"unexpected tensors: blocks\.2\."):
        AssembledWeights(FAMILY, CONFIG, checkpoint=checkpoint)


def test_one_part_from_two_tensors_is_an_error() -> None:
    family = dataclasses.replace(FAMILY, names={**FAMILY.names, "again": "norm.weight"})
    checkpoint = MemoryCheckpoint(_tensors() | {"again": np.zeros(8)})
    with pytest.raises(CheckpointError, match=r"repeated tensors: norm\.weight"):
        AssembledWeights(family, CONFIG, checkpoint=checkpoint)


def test_a_tied_head_that_is_stored_too_is_not_read() -> None:
    checkpoint = MemoryCheckpoint(_tensors() | {"lm_head": np.zeros((11, 8))})
    weights = AssembledWeights(FAMILY, CONFIG, checkpoint=checkpoint)
    assert len(dict(weights)) == len(weights)
    assert "head.weight" not in weights
    assert "lm_head" not in checkpoint.read


def test_absurd_numbers_of_layers_cost_nothing() -> None:
    config = dataclasses.replace(CONFIG, num_layers=4096)
    with pytest.raises(CheckpointError, match="more layers than tensors"):
        AssembledWeights(FAMILY, config, checkpoint=MemoryCheckpoint(_tensors()))


def test_long_lists_of_names_are_cut() -> None:
    extra = {f"surprise{index}": np.zeros(1) for index in range(1000)}
    with pytest.raises(CheckpointError, match="and 995 more") as refused:
        AssembledWeights(FAMILY, CONFIG, checkpoint=MemoryCheckpoint(_tensors() | extra))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"model_type": None},
        {"hidden_size": None},
        {"hidden_size": "64"},
        {"hidden_size": -1},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"rope_theta": "x"},
        {"rope_scaling": 5},
        {"rms_norm_eps": []},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**9},
    ],
)
def test_bad_configurations_are_checkpoint_errors(
    tiny_model: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tiny_model.write_folder(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(tiny_model.config() | change))
    with pytest.raises(CheckpointError):
        load_model(folder)
