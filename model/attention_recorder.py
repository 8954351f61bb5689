"""The network of `model.transformer` with a recorder in place of plain attention: see
`attention_maps`. Legend: `model.batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from model.config import ModelConfig
from model.layers import load_weights
from model.memory import return_free_memory
from model.transformer import Transformer, attention_weights, mixed
from model.weights import Arrays, to_tensor

HOST = torch.device("cpu")


def read_map(
    weights: Arrays,
    config: ModelConfig,
    tokens: Sequence[int],
    *,
    layer: int | None,
    head: int | None,
) -> list[list[float]]:
    """The rows of a map, each up to its own token, or whole if attention is bidirectional."""
    causal = not config.bidirectional
    recorder = Recorder(layer=layer, head=head, causal=causal)
    with torch.inference_mode():
        tokens_T = torch.tensor(tokens)
        network = _network(weights, config)
        network.hidden(tokens_T, torch.arange(len(tokens_T)), attend=recorder)
        map_TT = recorder.mean()
    return_free_memory()
    rows: list[list[float]] = map_TT.tolist()
    return [row[: position + 1] for position, row in enumerate(rows)] if causal else rows


def _network(weights: Arrays, config: ModelConfig) -> Transformer:
    """A network without weights, each part of which has its own while it computes."""
    with torch.device("meta"):
        network = Transformer(config)
    for name in ("embed", "position", "types", "embed_norm"):
        module = getattr(network, name)
        if module is not None:
            _lend(weights, module, f"{name}.")
    for layer, block in enumerate(network.blocks):
        _lend(weights, block, f"blocks.{layer}.")
    return network


def _lend(weights: Arrays, module: nn.Module, prefix: str) -> None:
    """Loads the module's weights before it runs and drops them after."""

    def load(module: nn.Module, _inputs: Any) -> None:  # noqa: ANN401  # whatever it is given
        own = {
            name.removeprefix(prefix): to_tensor(weights[name])
            for name in weights
            if name.startswith(prefix)
        }
        load_weights(module, own, dtype=torch.float32, device=HOST)

    def drop(module: nn.Module, *_: Any) -> None:  # noqa: ANN401
        module.to_empty(device="meta")

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)


class Recorder:
    """Attention over a whole text that keeps the sum of the chosen layers' and heads' weights."""

    def __init__(self, *, layer: int | None, head: int | None, causal: bool = True) -> None:
        self._causal = causal
        self._layer = layer
        self._head = head
        self._sum_TT = torch.zeros(())
        self._count = 0

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        *,
        layer: int,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        weights = attention_weights(q_THD, k_TKD, scale=scale, window=window, causal=self._causal)
        if self._layer in {None, layer}:
            heads_HTT = weights.flatten(0, 1)
            self._sum_TT = self._sum_TT + (
                heads_HTT.mean(dim=0) if self._head is None else heads_HTT[self._head]
            )
            self._count += 1
        return mixed(weights, v_TKD)

    def mean(self) -> torch.Tensor:
        """The weights, [T, T]; row t is what token t attends to."""
        return self._sum_TT / self._count
