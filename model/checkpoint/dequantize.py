"""Quantised blocks -> float32. The formats of the default model are written here, for speed.

`gguf` has every format and is the truth; the ones here are two to three times as fast and are
tested against it bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from model.checkpoint.gguf_header import STORAGE

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

CHUNK = 4096  # blocks at a time: what they become stays in the CPU's cache

_VALUES = {storage.name: storage.values for storage in STORAGE.values()}  # per block


def dequantize(blocks: Bytes, storage: str) -> Floats:
    """Turns blocks [n, bytes per block] of the named type into float32 [n, values per block]."""
    write = _FAST.get(storage) or _by_gguf(storage)
    out = np.empty((len(blocks), _VALUES[storage]), np.float32)
    for start in range(0, len(blocks), CHUNK):
        write(blocks[start : start + CHUNK], out[start : start + CHUNK])
    return out


def _by_gguf(storage: str) -> Callable[[Bytes, Floats], None]:
    """Its own, which takes rows of blocks: one long row is up to five times as fast as many."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as gguf_dequantize

    def write(blocks: Bytes, out: Floats) -> None:
        values = gguf_dequantize(blocks.reshape(1, -1), GGMLQuantizationType[storage])
        out[:] = values.reshape(out.shape)

    return write


def _half(blocks: Bytes, start: int) -> Floats:
    """The half-precision number at byte `start` of each block, as a column."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out, dtype=np.float32)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    codes = blocks[:, 2:]
    out[:, :16] = codes & 15
    out[:, 16:] = codes >> 4
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    codes = blocks[:, 4:]
    out[:, :16] = codes & 15
    out[:, 16:] = codes >> 4
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


_FAST: dict[str, Callable[[Bytes, Floats], None]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
