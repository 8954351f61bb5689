"""Adapted layers of the torch runner: a linear layer, plus the products of the rows' adapters.

Rows without an adapter are computed as if there were none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from model.adapters import Adapter, rows_of_adapters
from model.batch import Batch
from model.transformer import Transformer

_Pair = tuple[torch.Tensor, torch.Tensor]  # A, B


class StepAdapters:
    """The rows of the present step by the number of their adapter, for all layers."""

    def __init__(self) -> None:
        self.rows: dict[int, torch.Tensor] = {}

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Reads which rows have which adapter."""
        found = rows_of_adapters(batch)
        self.rows = {n: torch.from_numpy(rows_R).to(device) for n, rows_R in found.items()}


class AdaptedLinear(nn.Module):
    """y = W x, and + B A x for the rows of each adapter: one small product per adapter and step."""

    def __init__(self, linear: nn.Module, pairs: Mapping[int, _Pair], step: StepAdapters) -> None:
        super().__init__()
        self._linear = linear
        self._pairs = pairs
        self._step = step

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        y_TC: torch.Tensor = self._linear(x_TC)
        for number, rows_R in self._step.rows.items():
            if number in self._pairs:
                a, b = self._pairs[number]
                y_TC.index_add_(0, rows_R, x_TC[rows_R] @ a.T @ b.T)
        return y_TC


def add_adapters(
    network: Transformer, adapters: Sequence[Adapter], *, dtype: torch.dtype, device: torch.device
) -> StepAdapters:
    """Puts the adapters, numbered from 1, into a network; returns what each step begins with."""
    step = StepAdapters()
    pairs: dict[str, dict[int, _Pair]] = {}
    for number, adapter in enumerate(adapters, start=1):
        for name, factors in adapter.factors.items():
            a, b = (
                torch.from_numpy(array).to(device=device, dtype=dtype)
                for array in (factors.a, factors.b)
            )
            pairs.setdefault(name, {})[number] = a, b
    for name, of_layer in pairs.items():
        parent, _, attribute = name.removesuffix(".weight").rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, attribute, AdaptedLinear(getattr(owner, attribute), of_layer, step))
    return step
