"""Paged attention over a compressed cache: few far keys, and a run of near ones.

    policy    far                      near
    window    the sinks                the window: the last tokens
    anchors   anchors, by number       the segment of the query so far

Under a window, queries are turned for the sinks to their position in the compressed cache, so that
distances stay as in training. Anchors are copied to blocks of their own. All is gathered from the
pool by columns of block tables; other columns were freed, and are not read. Sequences with equally
many queries attend together if they are few, chunks of prompts alone. Legend: `model.batch`; N:
queries of a sequence, L: gathered slots, far ones first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.attention.torch_paged import Longs, alike
from model.batch import Batch, Segments
from model.compression import SINKS, Compression, Window
from model.config import ModelConfig
from model.layers import Rotation, rotate, rotation

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Reads:
    """What one sequence reads: blocks, and which of their slots each of its queries sees."""

    far: Longs  # blocks
    near: Longs
    seen_far: Bools  # [N, len(far) * block_size]
    seen_near: Bools


@dataclass(frozen=True, slots=True)
class _Group:
    """S sequences of N queries each."""

    rows: torch.Tensor  # [S * N]
    size: int  # S
    blocks: torch.Tensor  # [S * B], far ones of a sequence first
    num_far: int  # slots
    hidden: torch.Tensor  # [S, 1, N, 1, L]
    unread: torch.Tensor  # slots that no query sees: their values may be anything, NaN included

    def attend(
        self,
        q_THD: torch.Tensor,
        far_THD: torch.Tensor,
        keys_XKD: torch.Tensor,
        values_XKD: torch.Tensor,
        *,
        scale: float,
        block_size: int,
    ) -> torch.Tensor:
        S, far = self.size, self.num_far
        K, D = keys_XKD.shape[1:]
        k_SKLD, v_SKLD = (
            pool.view(-1, block_size * K * D)
            .index_select(0, self.blocks)
            .view(-1, K, D)
            .index_fill_(0, self.unread, 0)
            .view(S, -1, K, D)
            .transpose(1, 2)
            for pool in (keys_XKD, values_XKD)
        )
        # The query heads that share a key head become rows of one product with it.
        near_q, far_q = (
            q[self.rows].view(S, -1, K, q.shape[1] // K, D).transpose(1, 2).flatten(2, 3)
            for q in (q_THD, far_THD)
        )
        k_SKDL = k_SKLD.transpose(2, 3)
        scores = torch.cat((far_q @ k_SKDL[..., :far], near_q @ k_SKDL[..., far:]), dim=-1)
        N = len(self.rows) // S
        scores = scores.view(S, K, N, -1, scores.shape[-1]).float() * scale
        weights = scores.masked_fill(self.hidden, -torch.inf).softmax(dim=-1)
        mixed_SKRD = weights.to(v_SKLD.dtype).flatten(2, 3) @ v_SKLD
        return mixed_SKRD.view(S, K, N, -1, D).transpose(1, 2).reshape(S * N, -1, D)


class CompressedAttention:
    """The backend of the torch runner under `kv_compression`; for models without windows."""

    def __init__(self, compression: Compression, config: ModelConfig) -> None:
        self._compression = compression
        self._config = config
        self._block_size = 0
        self._groups: list[_Group] = []
        self._turn: Rotation | None = None  # of queries, for the far keys; None: as they are
        self._copies: tuple[torch.Tensor, torch.Tensor] | None = None  # slots: of, to

    def prepare(self, batch: Batch, *, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._groups = [
            _group(batch, members, reads, device=device) for members, reads in self._together(batch)
        ]
        self._turn = self._copies = None
        if not isinstance(self._compression, Window):
            self._copies = _copies(batch, block_size=block_size, device=device)
            return
        past = batch.positions_T - (self._compression.span - 1)
        if (past > 0).any():
            turned = torch.from_numpy(-np.maximum(past, 0)).to(device)
            self._turn = rotation(turned, self._config)

    def attend(
        self,
        queries_THD: torch.Tensor,
        keys_XKD: torch.Tensor,
        values_XKD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        if window is not None:
            raise ValueError("a compressed cache serves models without a sliding window")
        if self._copies is not None:
            of, to = self._copies
            for pool in (keys_XKD, values_XKD):
                pool.index_copy_(0, to, pool.index_select(0, of))
        far_THD = queries_THD if self._turn is None else rotate(queries_THD, self._turn)
        mixed_THD = torch.empty_like(queries_THD)
        for group in self._groups:
            mixed_THD[group.rows] = group.attend(
                queries_THD, far_THD, keys_XKD, values_XKD,
                scale=scale, block_size=self._block_size,
            )  # fmt: skip
        return mixed_THD

    def _together(self, batch: Batch) -> Iterator[tuple[Longs, list[_Reads]]]:
        """Groups of sequences, and what each of them reads."""
        lengths_S = np.diff(batch.query_starts_S1).astype(np.int64)
        for members in alike(lengths_S):
            length = int(lengths_S[members[0]])
            yield members, [self._reads(batch, each, length) for each in members.tolist()]

    def _reads(self, batch: Batch, sequence: int, length: int) -> _Reads:
        size = self._block_size
        end = int(batch.context_lens_S[sequence])
        queries = np.arange(end - length, end)[:, None]
        table = batch.block_table_SB[sequence].astype(np.int64)
        if isinstance(self._compression, Window):
            window = self._compression.size
            oldest = queries - window + 1
            far_table, most = table, min(SINKS, end) if end > window else 0
            sees = np.minimum(SINKS, oldest)  # leading far slots, per query
        else:
            segments = _segments(batch)
            rows = slice(*batch.query_starts_S1[sequence : sequence + 2].tolist())
            oldest, sees = (
                column[rows, None].astype(np.int64)
                for column in (segments.starts_T, segments.seen_T)
            )
            far_table, most = segments.table_SB[sequence].astype(np.int64), int(sees.max())
        num_far, first = -(-most // size), max(0, int(oldest[0, 0])) // size
        near = np.arange(first * size, -(-end // size) * size)
        return _Reads(
            far=far_table[:num_far],
            near=table[first : -(-end // size)],
            seen_far=np.arange(num_far * size) < sees,
            seen_near=(near >= oldest) & (near <= queries),
        )


def _segments(batch: Batch) -> Segments:
    if batch.segments is None:
        raise ValueError("a cache compressed to anchors needs the segments of a batch")
    return batch.segments


def _copies(
    batch: Batch, *, block_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Slots of the step's anchors at their positions, and among the anchors; None: no anchor."""
    segments = _segments(batch)
    if not len(segments.rows_A):
        return None
    owners = np.searchsorted(batch.query_starts_S1, segments.rows_A, side="right") - 1
    slots = [
        table[owners, numbers // block_size].astype(np.int64) * block_size + numbers % block_size
        for table, numbers in (
            (batch.block_table_SB, batch.positions_T[segments.rows_A]),
            (segments.table_SB, segments.numbers_A),
        )
    ]
    of, to = (torch.from_numpy(each).to(device) for each in slots)
    return of, to


def _group(batch: Batch, members: Longs, reads: list[_Reads], *, device: torch.device) -> _Group:
    """Pads what the sequences read to equal length, with slots that none of them sees."""
    S, N = len(members), len(reads[0].seen_far)
    width_far = max(read.seen_far.shape[1] for read in reads)
    width = width_far + max(read.seen_near.shape[1] for read in reads)
    num_far, num = max(len(read.far) for read in reads), max(len(read.near) for read in reads)
    blocks = np.zeros((S, num_far + num), np.int64)
    seen = np.zeros((S, N, width), np.bool_)
    for index, read in enumerate(reads):
        blocks[index, : len(read.far)] = read.far
        blocks[index, num_far : num_far + len(read.near)] = read.near
        seen[index, :, : read.seen_far.shape[1]] = read.seen_far
        seen[index, :, width_far : width_far + read.seen_near.shape[1]] = read.seen_near
    starts = batch.query_starts_S1[members].astype(np.int64)
    return _Group(
        rows=torch.from_numpy((starts[:, None] + np.arange(N)).ravel()).to(device),
        size=S,
        blocks=torch.from_numpy(blocks.ravel()).to(device),
        num_far=width_far,
        hidden=torch.from_numpy(~seen[:, None, :, None]).to(device),
        unread=torch.from_numpy(np.flatnonzero(~seen.any(axis=1))).to(device),
    )
