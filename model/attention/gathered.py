"""Attention to slots of the paged cache, with a bias of the scores: for encoder-decoders.

Sequences with few queries attend together, padded to the longest; a longer chunk attends alone.
Padding repeats a sequence's first slot: what was never stored may be NaN, which no mask stops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from model.attention.torch_paged import Longs, alike
from model.batch import Batch, Ints
from model.kvcache import slots_of

Bias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Positions of queries [..., T] and keys [..., L] -> what scores are raised by, [..., H, T, L]."""


@dataclass(frozen=True, slots=True)
class _Group:
    """S sequences of n queries each, over L slots each."""

    rows: torch.Tensor  # of T, [S, n]
    slots: torch.Tensor  # [S, L]
    mask: torch.Tensor | None  # [S, 1 or H, n, L]: truth values, or added to the scores


class Gathered:
    """The index arithmetic of a step, for all layers.

    The queries of sequence s see the first `lens_S[s]` positions of its row of the table; `causal`:
    they are the last of these, and see none after their own.
    """

    def __init__(
        self,
        batch: Batch,
        table_SB: Ints,
        lens_S: Ints,
        *,
        block_size: int,
        device: torch.device,
        bias: Bias | None = None,
        causal: bool = False,
    ) -> None:
        self._table_SB, self._lens_S = table_SB, lens_S.astype(np.int64)
        self._size, self._device = block_size, device
        self._bias, self._causal = bias, causal
        starts_S = batch.query_starts_S1[:-1].astype(np.int64)
        lengths_S = np.diff(batch.query_starts_S1).astype(np.int64)
        self._groups: list[_Group] = []
        for members in alike(lengths_S):
            rows = starts_S[members][:, None] + np.arange(lengths_S[members[0]])
            self._groups.append(self._group(members, rows))

    def attend(
        self,
        queries_THD: torch.Tensor,
        keys_XKD: torch.Tensor,
        values_XKD: torch.Tensor,
        *,
        scale: float,
    ) -> torch.Tensor:
        """Returns [T, H, D]. Keys and values: one layer of the pool, of H heads, too."""
        mixed_THD = torch.empty_like(queries_THD)
        for group in self._groups:
            q_SHnD = queries_THD[group.rows].transpose(1, 2)
            k_SHLD, v_SHLD = (pool[group.slots].transpose(1, 2) for pool in (keys_XKD, values_XKD))
            mask = group.mask
            if mask is not None and mask.dtype is not torch.bool:
                mask = mask.to(q_SHnD.dtype)
            mixed_SHnD = functional.scaled_dot_product_attention(
                q_SHnD, k_SHLD, v_SHLD, attn_mask=mask, scale=scale
            )
            mixed_THD[group.rows] = mixed_SHnD.transpose(1, 2)
        return mixed_THD

    def _group(self, members: Longs, rows_Sn: Longs) -> _Group:
        lens_S1 = self._lens_S[members][:, None]
        positions_L = np.arange(int(lens_S1.max()))
        inside_SL = positions_L < lens_S1
        positions_SL = np.where(inside_SL, positions_L, 0)
        slots = [
            slots_of(self._table_SB[member], positions, block_size=self._size)
            for member, positions in zip(members.tolist(), positions_SL, strict=True)
        ]
        n = rows_Sn.shape[1]
        seen_SnL = np.repeat(inside_SL[:, None], n, axis=1)
        queries_Sn = lens_S1 - n + np.arange(n)
        if self._causal:
            seen_SnL &= positions_L <= queries_Sn[:, :, None]
        mask = None if seen_SnL.all() else torch.from_numpy(seen_SnL)[:, None].to(self._device)
        if self._bias is not None:
            keys = torch.from_numpy(positions_L).to(self._device)
            bias = self._bias(torch.from_numpy(queries_Sn).to(self._device), keys)
            if bias is not None:
                mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        return _Group(
            rows=torch.from_numpy(rows_Sn).to(self._device),
            slots=torch.from_numpy(np.stack(slots)).to(self._device),
            mask=mask,
        )
