"""Paged attention by the Triton kernels, as a backend like any other.

It uploads a step's block tables and lengths and calls `model.kernels.attention`. The cuda runner
calls the kernels directly, because it keeps tables and lengths on the device.
"""

from __future__ import annotations

import torch

from model.batch import Batch
from model.kernels.attention import Partials, attention_programs, paged_attention
from model.kernels.work_list import WorkList, shares_for


class TritonPagedAttention:
    """Lists the items of a step once per window that the layers have."""

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._block_size = 0
        self._programs = 0
        self._starts_S1 = self._contexts_S = self._table_SB = self._batch_slots_S = torch.zeros(0)
        self._prepared: dict[int | None, tuple[WorkList, Partials]] = {}

    def prepare(self, batch: Batch, *, block_size: int, device: torch.device) -> None:
        self._batch = batch
        self._block_size = block_size
        self._programs = attention_programs(device)
        self._starts_S1 = torch.tensor(batch.query_starts_S1, device=device)
        self._contexts_S = torch.tensor(batch.context_lens_S, device=device)
        self._table_SB = torch.tensor(batch.block_table_SB, device=device)
        self._batch_slots_S = torch.arange(batch.num_sequences, dtype=torch.int32, device=device)
        self._prepared = {}

    def attend(
        self,
        queries_THD: torch.Tensor,
        keys_XKD: torch.Tensor,
        values_XKD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        if self._batch is None:
            raise ValueError("prepare comes before attend")
        H, D = queries_THD.shape[1:]
        if window not in self._prepared:
            self._prepared[window] = self._list(self._batch, H // keys_XKD.shape[1], (H, D), window)
        work, partials = self._prepared[window]
        return paged_attention(
            queries_THD.contiguous(),
            keys_XKD,
            values_XKD,
            self._table_SB,
            work=work,
            partials=partials,
            block_size=self._block_size,
            scale=scale,
            window=window,
            programs=self._programs,
        )

    def _list(
        self, batch: Batch, group: int, heads: tuple[int, int], window: int | None
    ) -> tuple[WorkList, Partials]:
        device = self._table_SB.device
        work = WorkList(
            max_rows=batch.num_tokens,
            max_sequences=batch.num_sequences,
            max_context=int(batch.context_lens_S.max()),
            group=group,
            device=device,
            shares=shares_for(self._programs, heads[0] // group),
        )
        work.fill(self._starts_S1, self._contexts_S, self._batch_slots_S, window=window)
        num_heads, head_dim = heads
        return work, Partials(work, num_heads=num_heads, head_dim=head_dim, device=device)
