"""Layers of a GGUF file in its own 8-bit blocks of 32: a scale in half precision, then 32 bytes."""

from __future__ import annotations

import numpy as np

from model.checkpoint import Checkpoint, CheckpointError
from model.checkpoint.four_bit import is_matrix_of_layer
from model.checkpoint.gguf import GgufCheckpoint
from model.weights import Array

_STORAGE = "Q8_0"


class EightBitCheckpoint(GgufCheckpoint):
    """A GGUF file whose matrices of layers are read as uint8: [out, in / 32 * 34]."""

    def load(self, name: str) -> Array:
        """Reads one tensor: blocks, or what is no matrix of a layer in the usual way."""
        entry = self.header.tensors[name]
        if not is_matrix_of_layer(name, entry):
            return super().load(name)
        blocks = self.stored(name)
        if not np.isfinite(np.ascontiguousarray(blocks[:, :2]).view(np.float16)).all():
            raise CheckpointError(f"{name}: a scale is not finite")
        return self.in_order(name, blocks.reshape(entry.shape[0], -1))


def as_eight_bit(checkpoint: Checkpoint) -> EightBitCheckpoint:
    """Opens a checkpoint again, for its blocks. Raises CheckpointError if it has none."""
    reason = eight_bit_reason(checkpoint)
    if reason is not None:
        raise CheckpointError(f"it cannot be read in 8 bits: {reason}")
    return EightBitCheckpoint(checkpoint.tokenizer)


def eight_bit_reason(checkpoint: Checkpoint) -> str | None:
    """Why the layers of a checkpoint cannot be read in 8 bits, or None if they can."""
    if not isinstance(checkpoint, GgufCheckpoint):
        return f"only GGUF files of type {_STORAGE} store weights in 8 bits"
    for name, entry in checkpoint.header.tensors.items():
        if is_matrix_of_layer(name, entry) and entry.storage.name != _STORAGE:
            return f"{name} is stored as {entry.storage.name}; all layers must be {_STORAGE}"
    return None
