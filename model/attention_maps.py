"""Attention maps: how much each token of a text attends to each earlier one, for people to see.

The network of `model.transformer` runs over the whole text in float32 and a recorder in place of
plain attention keeps the weights. Nothing of it stays in memory: a block's weights are read from
the checkpoint when its turn comes and are let go when it has run, so a map costs the memory of one
block and of the embedding, whatever the model's size, and some tenths of a second of reading.

It serves nothing and shares nothing with a runner. A runner that computes in 8 bits attends within
rounding to the same tokens. Legend: `model.batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from model.checkpoint import Checkpoint, configure
from model.checkpoint.assemble import assemble
from model.layers import load_weights
from model.memory import return_free_memory
from model.transformer import Transformer, causal_weights, mixed

HOST = torch.device("cpu")


class AttentionMaps:
    """Reads maps of any text from an opened checkpoint. Keeps no state: may be called anywhere."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._family, self.config = configure(checkpoint)
        self.num_layers = self.config.num_layers
        self.num_heads = self.config.num_heads

    def read(
        self, tokens: Sequence[int], *, layer: int | None = None, head: int | None = None
    ) -> list[list[float]]:
        """For each token its weights over the tokens up to itself; they sum to 1.

        None is the mean over all layers or heads. Raises CheckpointError for a bad checkpoint.
        """
        recorder = Recorder(layer=layer, head=head)
        with torch.inference_mode():
            tokens_T = torch.tensor(tokens)
            self._network().hidden(tokens_T, torch.arange(len(tokens_T)), attend=recorder)
            map_TT = recorder.mean()
        return_free_memory()
        return [row[: position + 1] for position, row in enumerate(map_TT.tolist())]

    def _network(self) -> Transformer:
        """A network without weights, each part of which has its own while it computes."""
        with torch.device("meta"):
            network = Transformer(self.config)
        self._lend(network.embed, "embed.")
        if network.position is not None:
            self._lend(network.position, "position.")
        for layer, block in enumerate(network.blocks):
            self._lend(block, f"blocks.{layer}.")
        return network

    def _lend(self, module: nn.Module, prefix: str) -> None:
        """Loads the module's weights before it runs and drops them after."""

        def load(module: nn.Module, _inputs: Any) -> None:  # noqa: ANN401  # whatever it is given
            weights = assemble(
                self._family, self.config, checkpoint=self._checkpoint, prefix=prefix
            )
            own = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
            load_weights(module, own, dtype=torch.float32, device=HOST)

        def drop(module: nn.Module, *_: Any) -> None:  # noqa: ANN401
            module.to_empty(device="meta")

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)


class Recorder:
    """Attention over a whole text that keeps the sum of the chosen layers' and heads' weights."""

    def __init__(self, *, layer: int | None, head: int | None) -> None:
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
        weights = causal_weights(q_THD, k_TKD, scale=scale, window=window)
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
