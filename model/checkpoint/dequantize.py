"""Quantised blocks -> float32. The formats of the default model are written here, for speed.

`gguf` has every format and is the truth; the ones here are two to three times as fast and are
tested against it bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

CHUNK = 4096  # blocks at a time: what they become stays in the CPU's cache


def dequantize(blocks: Bytes, storage: str) -> Floats:
    """Turns blocks [n, bytes a block] of the named type into float32 [n, values a block]."""
    fast = _FAST.get(storage)
    if fast is None:
        return _by_gguf(blocks, storage)
    out = np.empty((len(blocks), 32), np.float32)
    for start in range(0, len(blocks), CHUNK):
        fast(blocks[start : start + CHUNK], out[start : start + CHUNK])
    return out


def _by_gguf(blocks: Bytes, storage: str) -> Floats:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as gguf_dequantize

    values: Floats = gguf_dequantize(blocks, GGMLQuantizationType[storage])
    return values


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
