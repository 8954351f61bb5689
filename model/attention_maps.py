"""Attention maps: how much each token of a text attends to the others, for people to see.

The network of `model.transformer` runs over the whole text in float32 and a recorder in place of
plain attention keeps the weights. Nothing of it stays in memory: a block's weights are read from
the checkpoint when its turn comes and are let go when it has run, so a map costs the memory of one
block and of the embedding, whatever the model's size, and some tenths of a second of reading.

It serves nothing and shares nothing with a runner. A runner that computes in 8 bits attends within
rounding to the same tokens. Torch is imported with the first map.
"""

from __future__ import annotations

from collections.abc import Sequence

from model.checkpoint import Checkpoint, configure
from model.checkpoint.assemble import AssembledWeights


class AttentionMaps:
    """Reads maps of any text from an opened checkpoint. Keeps no state: may be called anywhere."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError for a bad checkpoint."""
        family, self.config = configure(checkpoint)
        self._weights = AssembledWeights(family, self.config, checkpoint=checkpoint)
        self.num_layers = self.config.num_layers
        self.num_heads = self.config.num_heads

    def read(
        self, tokens: Sequence[int], *, layer: int | None = None, head: int | None = None
    ) -> list[list[float]]:
        """For each token its weights over the tokens up to itself or, in an encoder, over all; they
        sum to 1.

        None is the mean over all layers or heads.
        """
        from model.attention_recorder import read_map

        return read_map(self._weights, self.config, tokens, layer=layer, head=head)
