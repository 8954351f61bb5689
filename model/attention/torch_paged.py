"""Paged attention by torch's own operators: gathers blocks, then one fused attention call.

Sequences with few queries (decoded tokens, verified drafts) attend together, in groups of similar
length so that padding stays small; a longer chunk of a prompt attends alone. The index tensors
and masks are built once per step for each window that the layers have.

What is gathered beyond a context may be anything, NaN included. A mask does not stop NaN
(0 · NaN = NaN), so groups overwrite it with zeros, and a chunk cuts it off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from model.batch import Batch

FEW_QUERIES = 16  # sequences with at most so many attend in groups
PADDING_PER_GROUP = 32  # blocks of padding that cost as much as the calls of another group

Longs = npt.NDArray[np.int64]
Hidden = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Group:
    """S sequences of n queries each, over B gathered blocks each: L = B * block_size positions."""

    rows: torch.Tensor | slice  # their rows of T, [S * n]
    size: tuple[int, int]  # S, n
    blocks: torch.Tensor  # [S * B]
    beyond: torch.Tensor | None  # gathered slots that hold no position of the context
    mask: (
        torch.Tensor | None
    )  # added to the scores, [S, 1, n * (H / K), L]; if n is 1, [S, 1, 1, L]

    def attend(
        self,
        queries_THD: torch.Tensor,
        keys_XKD: torch.Tensor,
        values_XKD: torch.Tensor,
        *,
        scale: float,
        block_size: int,
    ) -> torch.Tensor:
        S, n = self.size
        K, D = keys_XKD.shape[1:]
        # The query heads that share a key head become rows of one small product with it.
        q_SnKGD = queries_THD[self.rows].view(S, n, K, -1, D)
        q_SKnD = q_SnKGD.transpose(1, 2).flatten(2, 3)
        k_SKLD, v_SKLD = (
            _gather(pool, self.blocks, block_size, zeroed=self.beyond)
            .view(S, -1, K, D)
            .transpose(1, 2)
            for pool in (keys_XKD, values_XKD)
        )
        mixed_SKnD = functional.scaled_dot_product_attention(
            q_SKnD, k_SKLD, v_SKLD, attn_mask=self.mask, scale=scale
        )
        return mixed_SKnD.view(S, K, n, -1, D).transpose(1, 2).reshape(S * n, -1, D)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One sequence of many queries over its own blocks, `length` positions of which are its own."""

    rows: slice
    blocks: torch.Tensor  # [B]
    length: int
    mask: torch.Tensor | None  # [n, length]; None: query i sees positions 0 .. i

    def attend(
        self,
        queries_THD: torch.Tensor,
        keys_XKD: torch.Tensor,
        values_XKD: torch.Tensor,
        *,
        scale: float,
        block_size: int,
    ) -> torch.Tensor:
        K, D = keys_XKD.shape[1:]
        queries = queries_THD[self.rows]
        q_KGTD = queries.view(len(queries), K, -1, D).permute(1, 2, 0, 3)
        k_KGLD, v_KGLD = (
            _gather(pool, self.blocks, block_size)[: self.length]
            .transpose(0, 1)[:, None]
            .expand(-1, q_KGTD.shape[1], -1, -1)  # shared by the group, not copied
            for pool in (keys_XKD, values_XKD)
        )
        mixed_KGTD = functional.scaled_dot_product_attention(
            q_KGTD, k_KGLD, v_KGLD, attn_mask=self.mask, is_causal=self.mask is None, scale=scale
        )
        return mixed_KGTD.permute(2, 0, 1, 3).flatten(1, 2)


class TorchPagedAttention:
    """The backend for any device; fast on a CPU."""

    def __init__(self) -> None:
        self._step: _Step | None = None
        self._work: dict[int | None, list[_Group | _Chunk]] = {}

    def prepare(self, batch: Batch, *, block_size: int, device: torch.device) -> None:
        self._step = _Step(batch, block_size=block_size, device=device)
        self._work = {}  # filled by the first layer of each window

    def attend(
        self,
        queries_THD: torch.Tensor,
        keys_XKD: torch.Tensor,
        values_XKD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        if self._step is None:
            raise RuntimeError("attend before prepare")
        if window not in self._work:
            sharing = queries_THD.shape[1] // keys_XKD.shape[1]
            plan = self._step.plan(window, sharing=sharing, dtype=queries_THD.dtype)
            self._work[window] = list(plan)
        mixed_THD = torch.empty_like(queries_THD)
        for work in self._work[window]:
            mixed_THD[work.rows] = work.attend(
                queries_THD, keys_XKD, values_XKD, scale=scale, block_size=self._step.block_size
            )
        return mixed_THD


def alike(lengths_S: Longs) -> Iterator[Longs]:
    """Sequences that attend together, by their numbers of queries: equally many if these are few;
    of many queries each alone.
    """
    for length in np.unique(lengths_S).tolist():
        members = np.flatnonzero(lengths_S == length)
        yield from [members] if length <= FEW_QUERIES else np.split(members, len(members))


class _Step:
    """Index arithmetic of a batch: which sequences attend together, over which blocks."""

    def __init__(self, batch: Batch, *, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self._device = device
        self._table_SB = batch.block_table_SB
        self._starts_S = batch.query_starts_S1[:-1].astype(np.int64)
        self._lengths_S = np.diff(batch.query_starts_S1).astype(np.int64)
        self._contexts_S = batch.context_lens_S.astype(np.int64)

    def plan(
        self, window: int | None, *, sharing: int, dtype: torch.dtype
    ) -> Iterator[_Group | _Chunk]:
        """All sequences of the step, each once. `sharing` query heads use one key head."""
        firsts_S = np.zeros_like(self._contexts_S)  # first block that any query sees
        if window is not None:
            oldest_S = self._contexts_S - self._lengths_S - window + 1
            firsts_S = np.maximum(oldest_S, 0) // self.block_size
        counts_S = -(-self._contexts_S // self.block_size) - firsts_S
        for members in alike(self._lengths_S):
            sequence, length = int(members[0]), int(self._lengths_S[members[0]])
            if length > FEW_QUERIES:
                first, count = int(firsts_S[sequence]), int(counts_S[sequence])
                yield self._chunk(sequence, first, count, window=window, dtype=dtype)
            else:
                for group in _groups(members, counts_S):
                    mask_rows = sharing if length > 1 else 1  # of one query all rows are equal
                    columns = firsts_S[group][:, None] + np.arange(counts_S[group].max())
                    yield self._group(
                        group, columns, window=window, mask_rows=mask_rows, dtype=dtype
                    )

    def _chunk(
        self, sequence: int, first: int, count: int, *, window: int | None, dtype: torch.dtype
    ) -> _Chunk:
        start, length = int(self._starts_S[sequence]), int(self._lengths_S[sequence])
        context, offset = int(self._contexts_S[sequence]), first * self.block_size
        queries = np.arange(context - length, context)
        hidden = _hidden(queries, np.arange(offset, context), window)
        plain = context == length and (window is None or window >= length)
        return _Chunk(
            rows=slice(start, start + length),
            blocks=self._tensor(self._table_SB[sequence, first : first + count]),
            length=context - offset,
            mask=None if plain else self._mask(hidden, dtype),
        )

    def _group(
        self,
        members: Longs,
        columns_SB: Longs,
        *,
        window: int | None,
        mask_rows: int,
        dtype: torch.dtype,
    ) -> _Group:
        """`columns_SB`: the columns of the block table to gather, some beyond the context."""
        contexts_S1 = self._contexts_S[members][:, None]
        length = int(self._lengths_S[members[0]])
        owned = columns_SB * self.block_size < contexts_S1
        blocks_SB = self._table_SB[members[:, None], np.where(owned, columns_SB, 0)]
        positions = columns_SB[:, :, None] * self.block_size + np.arange(self.block_size)
        positions_SL = positions.reshape(len(members), -1)
        beyond = np.flatnonzero(positions_SL >= contexts_S1)
        queries_Sn = contexts_S1 - length + np.arange(length)
        hidden_SnL = _hidden(queries_Sn, positions_SL, window).repeat(mask_rows, axis=1)
        rows = (self._starts_S[members][:, None] + np.arange(length)).ravel()
        together = rows[-1] - rows[0] + 1 == len(rows)
        return _Group(
            rows=slice(int(rows[0]), int(rows[-1]) + 1) if together else self._tensor(rows),
            size=(len(members), length),
            blocks=self._tensor(blocks_SB.ravel()),
            beyond=self._tensor(beyond) if len(beyond) else None,
            mask=self._mask(hidden_SnL[:, None], dtype) if hidden_SnL.any() else None,
        )

    def _tensor(self, array: npt.NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device)

    def _mask(self, hidden: Hidden, dtype: torch.dtype) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=dtype)
        return mask.masked_fill_(torch.from_numpy(hidden), -torch.inf).to(self._device)


def _hidden(queries: Longs, positions: Longs, window: int | None) -> Hidden:
    """Which of the last axis of `positions` the queries, by position, do not see."""
    ago = queries[..., :, None] - positions[..., None, :]
    hidden: Hidden = ago < 0 if window is None else (ago < 0) | (ago >= window)
    return hidden


def _groups(members: Longs, counts_S: Longs) -> Iterator[Longs]:
    """Groups sequences of similar length, so that none pads more than another group would cost."""
    longest_first = members[np.argsort(-counts_S[members], kind="stable")]
    start = padding = 0
    for index, sequence in enumerate(longest_first):
        missing = int(counts_S[longest_first[start]] - counts_S[sequence])
        if padding + missing > PADDING_PER_GROUP:
            yield np.sort(longest_first[start:index])
            start, padding, missing = index, 0, 0
        padding += missing
    yield np.sort(longest_first[start:])


def _gather(
    pool_XKD: torch.Tensor,
    blocks: torch.Tensor,
    block_size: int,
    *,
    zeroed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The slots of the blocks, end to end, as a copy: [len(blocks) * block_size, K, D]."""
    # Whole blocks at a time: rows of kilobytes copy several times faster than rows of bytes.
    K, D = pool_XKD.shape[1:]
    slots = pool_XKD.view(-1, block_size * K * D).index_select(0, blocks).view(-1, K, D)
    return slots if zeroed is None else slots.index_fill_(0, zeroed, 0)
