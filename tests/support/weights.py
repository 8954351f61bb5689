"""Weights in other forms, to compare with: blocks of 4 bits as floats, shares of ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from model.checkpoint.dequantize import Bytes, dequantize
from model.checkpoint.four_bit import BLOCK_BYTES
from model.config import ModelConfig
from model.parallel.shares import share_config, share_tensor


def dequantized(blocks_NB: Bytes) -> npt.NDArray[np.float32]:
    """Float32 weights [out, in] of blocks [out, in / 32 * 20]."""
    values = dequantize(blocks_NB.reshape(-1, BLOCK_BYTES), "Q4_1")
    return values.reshape(len(blocks_NB), values.size // len(blocks_NB))


def share_weights(
    config: ModelConfig, weights: Mapping[str, torch.Tensor], *, rank: int, num_ranks: int
) -> dict[str, torch.Tensor]:
    """A rank's share, under the same names. `config` is the whole network's."""
    share_config(config, num_ranks=num_ranks)
    return {
        name: share_tensor(name, weights[name], config=config, rank=rank, num_ranks=num_ranks)
        for name in weights
    }
