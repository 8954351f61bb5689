"""The KV cache: keys and values of every token computed so far, in one pool of blocks.

Storage only: which block belongs to whom, and which is free, is the service's bookkeeping.

    pool [layers, 2, X, K, D]      X = num_blocks * block_size slots
    slot of position p of sequence s = block_table_SB[s, p // block_size] * block_size
                                       + p % block_size
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from model.batch import Batch, Ints
from model.config import ModelConfig


def bytes_per_block(config: ModelConfig, block_size: int, *, dtype: torch.dtype) -> int:
    """Memory of one block over all layers, keys and values."""
    return 2 * config.num_layers * block_size * config.kv_size * dtype.itemsize


def blocks_within(memory: int, config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
    """Blocks that fit into `memory` bytes. Raises ValueError if not even one fits."""
    size = bytes_per_block(config, block_size, dtype=dtype)
    if memory < size:
        raise ValueError(f"kv_memory must be at least {size} bytes, which is one block")
    return memory // size


def slots_of(
    table_B: Ints, positions: npt.NDArray[np.int64], *, block_size: int
) -> npt.NDArray[np.int64]:
    """The slots of positions of one sequence."""
    blocks = table_B[positions // block_size].astype(np.int64)
    return blocks * block_size + positions % block_size


class KVCache:
    """The pool's tensors. Slots that were never stored hold arbitrary values, NaN included."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        block_size: int,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        # Left unwritten, so that the system gives memory as blocks come into use.
        self.pool = torch.empty(
            (config.num_layers, 2, num_blocks * block_size, config.num_kv_heads, config.head_dim),
            dtype=dtype,
            device=device,
        )
        self._layers = [(layer[0], layer[1]) for layer in self.pool]

    def slots(self, batch: Batch) -> torch.Tensor:
        """The slot of each token of the step, [T]."""
        lengths = np.diff(batch.query_starts_S1)
        rows = np.repeat(np.arange(batch.num_sequences), lengths)
        blocks = batch.block_table_SB[rows, batch.positions_T // self.block_size]
        slots = blocks.astype(np.int64) * self.block_size + batch.positions_T % self.block_size
        return torch.from_numpy(slots).to(self.pool.device)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, [X, K, D]."""
        return self._layers[layer]

    def store(
        self, layer: int, slots_T: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the step's K and V of a layer; returns the layer's keys and values, [X, K, D]."""
        keys_XKD, values_XKD = self._layers[layer]
        keys_XKD.index_copy_(0, slots_T, k_TKD)
        values_XKD.index_copy_(0, slots_T, v_TKD)
        return keys_XKD, values_XKD
