"""Weights of 8 bits on a GPU: e4m3 with a scale per output, or a GGUF file's own Q8_0 blocks.

    float8   values e4m3 [N, K], scales float32 [N]: rounded here
    blocks   values int8 [N, K], scales float16 [N, K / 32]: as the file has them

Both are matrices of layers alone: embedding, norms, biases and head stay as they are. The product
makes them numbers of x's dtype in registers (`model.kernels.matmul`), so that a network has the
bits of one whose weights were unpacked before.

e4m3 has 3 bits of mantissa. Its scales are powers of two: they cost no precision, since a float's
relative error depends on no scale, and a weight times its scale is a number of bfloat16. Legend:
N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from model.weights import Weights

BLOCK_INPUTS = 32
_BLOCK_BYTES = 2 + BLOCK_INPUTS  # a scale in half precision, then the values
_LARGEST = 448.0  # of e4m3
_LEAST_EXPONENT = -100  # of a scale: rows of smaller weights come close to zero
_MATRICES = tuple(
    f".{name}.weight" for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
)


class PackedWeight(NamedTuple):
    """Values times scales, of one of the two kinds."""

    values_NK: torch.Tensor
    scales: torch.Tensor

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, rounded once; one in float8 is exact in bfloat16."""
        scales = self.scales.float()
        if scales.dim() == 1:
            return (self.values_NK.float() * scales[:, None]).to(dtype)
        return (self.values_NK.float() * scales.repeat_interleave(BLOCK_INPUTS, dim=1)).to(dtype)


def to_float8(weight_NK: torch.Tensor) -> PackedWeight:
    """Rounds to the nearest. Raises ValueError for weights that are not finite."""
    wide = weight_NK.float()
    largest_N = wide.abs().amax(dim=1)
    if not bool(torch.isfinite(largest_N).all()):
        raise ValueError("dtype float8 needs finite weights: use bfloat16")
    # frexp: x = m · 2**e with 0.5 <= m < 1. So x · 2**(9 - e) is below 512; 448 is 0.875 · 512.
    mantissa_N, exponent_N = torch.frexp(largest_N)
    exponent_N = exponent_N - 9 + (mantissa_N > _LARGEST / 512).int()
    scale_N = torch.ldexp(torch.ones_like(largest_N), exponent_N.clamp(min=_LEAST_EXPONENT))
    values = (wide / scale_N[:, None]).clamp(-_LARGEST, _LARGEST)
    return PackedWeight(values.to(torch.float8_e4m3fn), scale_N)


def from_blocks(blocks: torch.Tensor) -> PackedWeight:
    """Takes Q8_0 blocks apart, uint8 [N, K / 32 * 34]."""
    parts = blocks.view(len(blocks), -1, _BLOCK_BYTES)
    scales = parts[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return PackedWeight(parts[..., 2:].contiguous().view(torch.int8).flatten(1), scales)


def is_matrix(name: str) -> bool:
    """Whether a weight of this canonical name is a matrix of a decoder's layer."""
    return name.startswith("blocks.") and name.endswith(_MATRICES)


class RoundedWeights(Mapping[str, torch.Tensor]):
    """Weights as dtype float8 has them, in bfloat16, for any runner."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        return to_float8(weight).to(torch.bfloat16) if is_matrix(name) else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
