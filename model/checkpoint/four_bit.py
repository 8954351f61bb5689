"""Layers of a GGUF file as they are stored: 4 bits a weight, in blocks of 32.

Q4_0, Q4_1 and Q4_K differ in how they store a block's scale and minimum; all become blocks of type
Q4_1, 20 bytes: a scale and a minimum in half precision, then 16 bytes, of which byte i holds inputs
i (low) and i + 16. The codes stay the same. Q4_K's scales are products of a half and 6 bits, which
are rounded to a half; those of the other two are exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from model.checkpoint import Checkpoint, CheckpointError
from model.checkpoint.dequantize import Bytes, Floats
from model.checkpoint.gguf import GgufCheckpoint
from model.checkpoint.gguf_header import TensorEntry
from model.weights import Array

BLOCK_INPUTS = 32
BLOCK_BYTES = 20


class FourBitCheckpoint(GgufCheckpoint):
    """A GGUF file whose matrices of layers are read as uint8: [out, in / 32 * 20]."""

    def load(self, name: str) -> Array:
        """Reads one tensor: blocks, or what is not in 4 bits in the usual way."""
        entry = self.header.tensors[name]
        if not is_matrix_of_layer(name, entry):
            return super().load(name)
        blocks = CONVERSIONS[entry.storage.name](self.stored(name))
        if not np.isfinite(_halves(blocks[:, :4])).all():
            raise CheckpointError(f"{name}: a scale is not finite in half precision; use int8")
        return self.in_order(name, blocks.reshape(entry.shape[0], -1))


def as_four_bit(checkpoint: Checkpoint) -> FourBitCheckpoint:
    """Opens a checkpoint again, for its blocks. Raises CheckpointError if it has none."""
    reason = four_bit_reason(checkpoint)
    if reason is not None:
        raise CheckpointError(f"it cannot be read in 4 bits: {reason}")
    return FourBitCheckpoint(checkpoint.tokenizer)


def four_bit_reason(checkpoint: Checkpoint) -> str | None:
    """Why the layers of a checkpoint cannot be read in 4 bits, or None if they can."""
    if not isinstance(checkpoint, GgufCheckpoint):
        return "only GGUF files store weights in 4 bits"
    for name, entry in checkpoint.header.tensors.items():
        if is_matrix_of_layer(name, entry) and entry.storage.name not in CONVERSIONS:
            known = ", ".join(CONVERSIONS)
            return f"{name} is stored as {entry.storage.name}; all layers must be one of {known}"
    return None


def is_matrix_of_layer(name: str, entry: TensorEntry) -> bool:
    """Whether a stored tensor is one that blocks are kept of."""
    return name.startswith("blk.") and len(entry.shape) == 2


def _halves(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _from_q4_0(blocks: Bytes) -> Bytes:
    """Scale, codes: a weight is scale * (code - 8)."""
    out = np.empty((len(blocks), BLOCK_BYTES), np.uint8)
    with np.errstate(over="ignore"):  # the caller checks for infinity
        minima = (_halves(blocks[:, :2]) * -8).astype(np.float16)
    out[:, :2], out[:, 2:4], out[:, 4:] = blocks[:, :2], minima.view(np.uint8), blocks[:, 2:]
    return out


def _from_q4_1(blocks: Bytes) -> Bytes:
    return blocks  # in the mapped file


def _from_q4_k(blocks: Bytes) -> Bytes:
    """Eight blocks: scale and minimum of all, 12 bytes with 6 bits of each one's, codes.

    As in llama.cpp's `get_scale_min_k4`: of the last four, the upper 2 bits are in the first eight
    bytes. Of each 32 bytes of codes, the low halves are one block and the high ones the next.
    """
    packed = blocks[:, 4:16].astype(np.uint8)
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    six_bits = np.stack(
        [
            np.hstack([scales & 63, (rest & 15) | (scales >> 6) << 4]),
            np.hstack([minima & 63, (rest >> 4) | (minima >> 6) << 4]),
        ],
        axis=-1,
    )
    signs = np.array([1, -1], np.float32)
    with np.errstate(over="ignore"):
        halves = (_halves(blocks[:, :4])[:, None] * six_bits * signs).astype(np.float16)
    codes = blocks[:, 16:].reshape(-1, 4, 1, 2, 16)
    codes = np.concatenate([codes & 15, codes >> 4], axis=2)  # [superblock, pair, block, half, 16]
    out = np.empty((len(blocks), 8, BLOCK_BYTES), np.uint8)
    out[..., :4] = halves.view(np.uint8)
    out[..., 4:] = (codes[..., 0, :] | codes[..., 1, :] << 4).reshape(-1, 8, 16)
    return out.reshape(-1, BLOCK_BYTES)


CONVERSIONS: dict[str, Callable[[Bytes], Bytes]] = {  # blocks as stored -> blocks of Q4_1
    "Q4_0": _from_q4_0,
    "Q4_1": _from_q4_1,
    "Q4_K": _from_q4_k,
}
