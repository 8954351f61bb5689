"""Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685): W + scale · B A, with W frozen.

Written as PEFT writes them. An adapter belongs to a matrix as checkpoints store it, which in the
network may be some rows of a fused one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from model.checkpoint.stored import Stored, stored_tensors
from model.training import TrainingError
from model.training.folder import Base, write_json
from model.transformer import Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn")
"""The matrices of attention: what is adapted by default, of these, is what the family has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """Which matrices are adapted, and how."""

    rank: int = 8
    alpha: float = 16.0  # the product's scale is alpha / rank
    targets: tuple[str, ...] = TARGETS  # last names of modules, or all-linear

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1024:
            raise TrainingError("the rank of adapters must be from 1 to 1024")
        if not 0 < self.alpha < math.inf:
            raise TrainingError("the alpha of adapters must be above 0")


class Adapter(nn.Module):
    """scale · B A x for the rows of one stored matrix; B is 0 at first, so nothing changes."""

    def __init__(self, stored: Stored, size: int, shape: LowRank) -> None:
        super().__init__()
        self.stored = stored
        self.scale = shape.alpha / shape.rank
        self.a = nn.Parameter(torch.empty(shape.rank, size))
        self.b = nn.Parameter(torch.zeros(stored.stop - stored.start, shape.rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as nn.Linear, and PEFT, do

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, self.a), self.b) * self.scale

    def product(self) -> torch.Tensor:
        """What is added to the matrix, [rows, in]."""
        return self.b @ self.a * self.scale


class AdaptedLinear(nn.Module):
    """A frozen linear layer and the adapters of its rows."""

    def __init__(self, linear: nn.Linear, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(requires_grad=False)
        self.adapters = nn.ModuleList(adapters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        for adapter in adapters_of(self):
            before = adapter.stored.start
            behind = self.linear.out_features - adapter.stored.stop
            y = y + functional.pad(adapter(x), (before, behind))
        return y

    def merged(self) -> torch.Tensor:
        """The layer's weight with its adapters' products."""
        weight = self.linear.weight.detach().clone()
        for adapter in adapters_of(self):
            weight[adapter.stored.start : adapter.stored.stop] += adapter.product().detach()
        return weight


def add_adapters(network: Transformer, base: Base, shape: LowRank, *, seed: int) -> None:
    """Freezes the network and puts adapters beside the targets. Raises TrainingError."""
    matrices = [
        each
        for each in stored_tensors(base.family, base.config)
        if each.fused.startswith("blocks.") and base.weights[each.fused].dim() == 2
    ]
    chosen = [each for each in matrices if _is_target(each, shape)]
    if not chosen:
        known = sorted({each.module.split(".")[-1] for each in matrices})
        raise TrainingError(f"no matrix has one of these names; known are {', '.join(known)}")
    network.requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for fused in dict.fromkeys(each.fused for each in chosen):
            parent, _, name = fused.removesuffix(".weight").rpartition(".")
            owner = network.get_submodule(parent)
            size = base.weights[fused].shape[1]
            parts = [each for each in chosen if each.fused == fused]
            adapters = [Adapter(part, size, shape) for part in parts]
            setattr(owner, name, AdaptedLinear(getattr(owner, name), adapters))


def _is_target(stored: Stored, shape: LowRank) -> bool:
    return "all-linear" in shape.targets or stored.module.split(".")[-1] in shape.targets


def adapters_of(network: nn.Module) -> Iterator[Adapter]:
    """Every adapter of a network."""
    return (module for module in network.modules() if isinstance(module, Adapter))


def merged_weights(network: Transformer) -> dict[str, torch.Tensor]:
    """The weights of a plain network that computes the same."""
    adapted = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, AdaptedLinear)
    }
    weights = {}
    for name, tensor in network.state_dict().items():
        if ".adapters." in name:
            continue
        owner = name.removesuffix(".linear.weight")
        plain = name.replace(".linear.", ".")
        weights[plain] = adapted[owner].merged() if owner in adapted else tensor
    return weights


def write_adapter(folder: Path, network: Transformer, shape: LowRank, *, base: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors. base: the base model's name."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules, turned = {}, set(), False
    for adapter in adapters_of(network):
        stored = adapter.stored
        modules.add(stored.module.split(".")[-1])
        turned |= stored.transposed
        for kind, matrix in (("A", adapter.a), ("B", adapter.b)):
            key = f"base_model.model.{stored.module}.lora_{kind}.weight"
            tensors[key] = matrix.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings: Mapping[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": turned,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", settings)
