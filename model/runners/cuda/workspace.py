"""Workspace: the device tensors that steps compute with, sized for the largest step.

Allocated once, because graphs are captured with the addresses. Of what a step leaves there the host
reads logits, their argmax and tokens. Legend: `model.batch`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.kernels.attention import Partials, attention_programs
from model.kernels.head import Argmax
from model.kernels.inputs import Column, decode_rows, mixed_rows
from model.kernels.work_list import WorkList, shares_for
from model.kvcache import KVCache
from model.runners import RunnerOptions
from model.runners.cuda.network import StepInputs
from model.runners.cuda.slots import BatchSlots


class MixedColumns(NamedTuple):
    """The rows of a step that the host describes, in the order they are uploaded in.

    A sequence may be empty. Its batch slot is then that of padding rows.
    """

    batch_slots_T: torch.Tensor
    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    unread_T: torch.Tensor  # 1: the token is the newest one in the batch slot
    starts_S1: torch.Tensor
    contexts_S: torch.Tensor
    batch_slots_S: torch.Tensor


class Workspace:
    """The state of the batch slots, the KV pool and the buffers of one runner."""

    def __init__(
        self,
        config: ModelConfig,
        options: RunnerOptions,
        *,
        windows: Iterable[int | None],
        slots: BatchSlots,
        kv_dtype: torch.dtype,
        device: torch.device,
        num_padding: int = 0,
    ) -> None:
        """`num_padding`: sequences of padding rows, beside those of a mixed step."""
        num_sequences = options.max_sequences
        self.max_sequences = num_sequences
        self.state = torch.from_numpy(slots.mirror.copy()).to(device)
        self._config, self._slots = config, slots
        self._block_size, self._kv_dtype = options.block_size, kv_dtype
        self._programs = attention_programs(device)
        self._work = {
            window: WorkList(
                max_rows=options.max_batch_tokens,
                max_sequences=num_sequences + num_padding,
                max_context=config.max_model_len,
                group=config.num_heads // config.num_kv_heads,
                device=device,
                shares=shares_for(self._programs, config.num_kv_heads),
            )
            for window in windows
        }
        self._any_work = next(iter(self._work.values()))
        self._partials = Partials(
            self._any_work,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            device=device,
        )
        self._starts_S1 = torch.arange(num_sequences + 1, dtype=torch.int32, device=device)
        self.logits_RV = torch.empty(
            (num_sequences, config.vocab_size), dtype=torch.float32, device=device
        )
        self.argmax = Argmax.empty(num_sequences, 1, device=device)  # of `logits_RV` as adjusted
        self.tokens_R = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        self.allocate_pool(0)

    def allocate_pool(self, num_blocks: int) -> None:
        """Allocates the KV pool, with one block more for padding rows."""
        self.pool = KVCache(
            self._config,
            block_size=self._block_size,
            num_blocks=num_blocks + 1,
            dtype=self._kv_dtype,
            device=self.state.device,
        ).pool
        self.pool[:, :, num_blocks * self._block_size :] = 0  # so that padding rows stay finite
        self._slots.set_pad_block(num_blocks)
        self.state.copy_(torch.from_numpy(self._slots.mirror))

    def decode_inputs(self, batch_slots_S: torch.Tensor) -> StepInputs:
        """One row per batch slot, read from the state."""
        size = len(batch_slots_S)
        tokens_T, positions_T, kv_slots_T, contexts_S, adapters_T = decode_rows(
            self.state, batch_slots_S, block_size=self._block_size
        )
        self._fill(self._starts_S1[: size + 1], contexts_S, batch_slots_S)
        return self._inputs(tokens_T, positions_T, kv_slots_T, adapters_T)

    def mixed_inputs(self, columns: MixedColumns) -> StepInputs:
        """Rows described by the host."""
        self._fill(columns.starts_S1, columns.contexts_S, columns.batch_slots_S)
        tokens_T, kv_slots_T, adapters_T = mixed_rows(
            self.state, *columns[:4], block_size=self._block_size
        )
        return self._inputs(tokens_T, columns.positions_T, kv_slots_T, adapters_T)

    def _fill(
        self, starts_S1: torch.Tensor, contexts_S: torch.Tensor, batch_slots_S: torch.Tensor
    ) -> None:
        for window, work in self._work.items():
            work.fill(starts_S1, contexts_S, batch_slots_S, window=window)

    def _inputs(
        self,
        tokens_T: torch.Tensor,
        positions_T: torch.Tensor,
        kv_slots_T: torch.Tensor,
        adapters_T: torch.Tensor,
    ) -> StepInputs:
        return StepInputs(
            tokens_T=tokens_T,
            positions_T=positions_T,
            kv_slots_T=kv_slots_T,
            adapters_T=adapters_T,
            table_SB=self.state[:, Column.TABLE :],
            pool=self.pool,
            block_size=self._block_size,
            work=self._work,
            partials=self._partials,
            programs=self._programs,
        )
