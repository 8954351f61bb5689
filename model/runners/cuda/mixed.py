"""Mixed steps as CUDA graphs: chunks of prompts and drafts to verify, beside decoded tokens.

A graph per token bucket has the rows' inputs and the network; the head and sampling, a dozen
launches, follow one by one. A step is padded to the smallest bucket that holds its rows:

    rows        rows of the sequences | padding rows                        to the bucket
    sequences   the step's sequences | empty ones | those of padding rows   always as many

    upload --+-- columns, at places that the bucket determines -- graph -- residual stream
             +-- rows that sample, changes of the state                       head, sampling

Nothing in a graph depends on numbers that only the host knows: loops take theirs from the columns,
and grids that would are as large as the bucket needs. A bucket ends with the range of rows for
which products have one layout, so padding adds no tile to a product. Padding rows write to the
block that no sequence has. `MixedShapes` needs no GPU and decides all of this; a step that fits no
bucket, or whose graph could not be captured, launches the same kernels one by one.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from model.batch import Batch, Bools, Ints
from model.kernels.matmul import Product
from model.kernels.tiling import layout_sizes
from model.runners.cuda.accelerator import Accelerator
from model.runners.cuda.buffers import Upload
from model.runners.cuda.graphs import CapturedGraphs
from model.runners.cuda.network import FusedNetwork
from model.runners.cuda.workspace import MixedColumns, Workspace

_LOG = logging.getLogger(__name__)
_MOST_ROWS = 2048  # of a graph: larger steps take the GPU longer than the host


def token_buckets(most: int) -> tuple[int, ...]:
    """The numbers of rows that graphs are captured for, up to `most` or `_MOST_ROWS`: the last of
    each range of rows whose products have one layout.
    """
    largest = min(most, _MOST_ROWS)
    return (*(start - 1 for start in layout_sizes(largest)[1:]), largest)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedShapes:
    """How mixed steps are padded. Without `buckets` they are not."""

    buckets: tuple[int, ...]
    max_sequences: int
    max_context: int
    pad_slot: int

    @property
    def num_padding(self) -> int:
        """Sequences that hold the padding rows of any step."""
        gaps = [after - before - 1 for before, after in pairwise((0, *self.buckets))]
        return -(-max(gaps, default=0) // self.max_context)

    @property
    def num_sequences(self) -> int:
        """Sequences of a padded step."""
        return self.max_sequences + self.num_padding

    def bucket(self, num_rows: int) -> int | None:
        """The smallest bucket that holds so many rows; None if they do not fit into any."""
        index = bisect_left(self.buckets, num_rows)
        return self.buckets[index] if index < len(self.buckets) else None

    def lengths(self, bucket: int) -> list[int]:
        """Of the columns of a step that is padded to a bucket."""
        sequences = self.num_sequences
        return [*[bucket] * 4, sequences + 1, sequences, sequences]

    def columns(self, batch: Batch, unread_T: Bools | None) -> list[Ints]:
        """The columns of a step, padded to its bucket if it has one, as in `MixedColumns`."""
        lengths_S = np.diff(batch.query_starts_S1)
        unread = np.zeros(batch.num_tokens, np.bool_) if unread_T is None else unread_T
        rows = [
            np.repeat(batch.batch_slots_S, lengths_S),
            batch.tokens_T,
            batch.positions_T,
            unread.astype(np.int32),
        ]
        sequences = [batch.query_starts_S1, batch.context_lens_S, batch.batch_slots_S]
        bucket = self.bucket(batch.num_tokens)
        return [*rows, *sequences] if bucket is None else self._padded(rows, sequences, bucket)

    def _padded(self, rows: list[Ints], sequences: list[Ints], bucket: int) -> list[Ints]:
        batch_slots_T, tokens_T, positions_T, unread_T = rows
        starts_S1, contexts_S, batch_slots_S = sequences
        gap, missing = bucket - len(tokens_T), self.num_sequences - len(contexts_S)
        full = np.arange(missing - 1, -1, -1, dtype=np.int32) * self.max_context
        padding = np.clip(gap - full, 0, self.max_context).astype(np.int32)  # empty ones first
        zeros, slots = np.zeros(gap, np.int32), np.full(gap, self.pad_slot, np.int32)
        positions = np.arange(gap, dtype=np.int32) - np.repeat(
            np.cumsum(padding, dtype=np.int32) - padding, padding
        )
        return [
            np.concatenate([batch_slots_T, slots]),
            np.concatenate([tokens_T, zeros]),
            np.concatenate([positions_T, positions]),
            np.concatenate([unread_T, zeros]),
            np.concatenate([starts_S1, starts_S1[-1] + np.cumsum(padding, dtype=np.int32)]),
            np.concatenate([contexts_S, padding]),
            np.concatenate([batch_slots_S, np.full(missing, self.pad_slot, np.int32)]),
        ]


class MixedGraphs:
    """The graphs of mixed steps. Columns are the first arrays of what is uploaded."""

    def __init__(
        self,
        accelerator: Accelerator,
        network: FusedNetwork,
        workspace: Workspace,
        *,
        upload: Upload,
        shapes: MixedShapes,
        padding: Callable[[int], Batch],
    ) -> None:
        """`padding`: a step of so many padding rows, which is computed while one is captured."""
        self._network = network
        self._workspace = workspace
        self._upload = upload
        self._padding = padding
        self._stream_TC = torch.zeros(  # one for all graphs, so that they share their memory
            (max(shapes.buckets, default=0), network.config.hidden_size),
            dtype=network.dtype,
            device=accelerator.device,
        )
        self.shapes = shapes
        self.graphs = CapturedGraphs(accelerator, self._run)
        self.enabled = bool(shapes.buckets)

    def capture(self, num_rows: int) -> None:
        """Captures the graph of such a step if it is missing. If that fails, there are no graphs.

        The KV pool must be allocated: a graph has its address.
        """
        bucket = self.shapes.bucket(num_rows)
        if bucket is None or not self.enabled or self.graphs.is_captured(bucket):
            return
        self._upload.send(self.shapes.columns(self._padding(bucket), None))
        try:
            self.graphs.capture(bucket)
        except RuntimeError as error:  # of CUDA, out of memory among them
            self.drop(str(error).partition("\n")[0])

    def capture_all(self) -> None:
        for bucket in reversed(self.shapes.buckets):  # largest first: the others share its memory
            self.capture(bucket)

    def drop(self, reason: str) -> None:
        """Launches mixed steps kernel by kernel from here on."""
        _LOG.warning("mixed steps are launched without CUDA graphs: %s", reason)
        self.enabled = False

    def hidden(
        self, columns: list[torch.Tensor], num_rows: int
    ) -> tuple[torch.Tensor, Product | None]:
        """The network over what was uploaded; see `FusedNetwork.hidden`. `num_rows`: unpadded."""
        bucket = self.shapes.bucket(num_rows)
        if bucket is None:
            return self._network.hidden(self._workspace.mixed_inputs(MixedColumns(*columns)))
        if self.enabled and self.graphs.is_captured(bucket):
            self.graphs.replay(bucket)
        else:
            self.graphs.run(bucket)
        return self._stream_TC[:num_rows], None

    def run_largest(self) -> None:
        """Launches what the largest graph has, without a graph: it needs as much memory."""
        if self.shapes.buckets:
            self._upload.send(self.shapes.columns(self._padding(self.shapes.buckets[-1]), None))
            self.graphs.run(self.shapes.buckets[-1])

    def _run(self, bucket: int) -> None:
        columns = self._upload.views(self.shapes.lengths(bucket))
        inputs = self._workspace.mixed_inputs(MixedColumns(*columns))
        self._network.stream(inputs, out_TC=self._stream_TC[:bucket])
