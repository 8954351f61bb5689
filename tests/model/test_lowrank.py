"""Adapters: applied equals merged, in the network and in the files for PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import load_model
from model.checkpoint.stored import stored_tensors
from model.training import TrainingError
from model.training.folder import Base, as_stored, write_model
from model.training.lowrank import (
    LowRank,
    adapters_of,
    add_adapters,
    merged_weights,
    write_adapter,
)
from model.training.network import build_network
from model.transformer import Transformer
from tests.model.training_models import FIELDS, tiny_base


def adapted(base: Base, shape: LowRank) -> Transformer:
    """A network whose adapters are not 0."""
    network = build_network(base.config, {n: w.clone() for n, w in base.weights.items()})
    add_adapters(network, base, shape, seed=3)
    generator = torch.Generator().manual_seed(4)
    for adapter in adapters_of(network):
        with torch.no_grad():
            adapter.b.normal_(generator=generator)
    return network


TARGETS = [("q_proj", "v_proj"), ("k_proj", "down_proj"), ("all-linear",), ("gate_proj", "o_proj")]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_merged_equals_applied(family: str, targets: tuple[str, ...]) -> None:
    base = tiny_base(family)
    network = adapted(base, LowRank(rank=3, alpha=5.0, targets=targets))
    plain = build_network(base.config, merged_weights(network))
    untouched = build_network(base.config, base.weights)
    tokens = torch.arange(3, 40)
    with torch.no_grad():
        applied, merged = network(tokens), plain(tokens)
        assert (applied - untouched(tokens)).abs().max() > 0.1
        torch.testing.assert_close(applied, merged, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_new_adapters_change_nothing_and_are_all_that_is_trained(family: str) -> None:
    base = tiny_base(family)
    network = build_network(base.config, base.weights)
    tokens = torch.arange(3, 40)
    before = network(tokens).detach()
    add_adapters(network, base, LowRank(rank=2), seed=0)
    assert torch.equal(network(tokens), before)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    per_layer = {"gpt2": 1, "llama": 4}[family]
    assert len(trained) == base.config.num_layers * per_layer * 2
    assert all(".adapters." in name for name in trained)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_files_hold_what_is_merged(family: str, tmp_path: Path) -> None:
    """By PEFT's rules: the module's name, W + alpha / r · B A, transposed if it is stored so."""
    base = tiny_base(family)
    shape = LowRank(rank=3, alpha=7.0, targets=("all-linear",))
    network = adapted(base, shape)
    write_adapter(tmp_path, network, shape, base="somewhere")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert settings["fan_in_fan_out"] == (family == "gpt2")
    plain = as_stored(base.family, base.config, base.weights)
    merged = as_stored(base.family, base.config, merged_weights(network))
    changed = 0
    for name, weight in plain.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in tensors:
            product = tensors.pop(f"{key}B.weight") @ tensors.pop(f"{key}A.weight")
            product *= settings["lora_alpha"] / settings["r"]
            weight.add_(product.T if settings["fan_in_fan_out"] else product)
            assert name.split(".")[-2] in settings["target_modules"]
            changed += 1
        torch.testing.assert_close(weight, merged[name])
    assert tensors == {}
    assert changed == base.config.num_layers * (4 if family == "gpt2" else 7)


@pytest.mark.parametrize("family", FIELDS)
def test_a_written_folder_is_read_back(family: str, tmp_path: Path) -> None:
    base = tiny_base(family)
    names = [each.name for each in stored_tensors(base.family, base.config)]
    assert len(names) == len(set(names))
    tensors = as_stored(base.family, base.config, base.weights)
    write_model(tmp_path, fields=base.fields, tensors=tensors, vocabulary=None)
    read = load_model(tmp_path)
    assert read.config == base.config
    assert read.weights.keys() == base.weights.keys()
    for name, tensor in base.weights.items():
        assert torch.equal(read.weights[name], tensor), name


@pytest.mark.parametrize(
    ("values", "message"), [({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha")], ids=str
)
def test_limits_of_adapters(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        LowRank(**values)


def test_unknown_targets_are_refused_with_the_known_ones() -> None:
    base = tiny_base("llama")
    network = build_network(base.config, base.weights)
    with pytest.raises(TrainingError, match="down_proj, gate_proj, k_proj"):
        add_adapters(network, base, LowRank(targets=("query",)), seed=0)
