"""CUDA graphs of decode steps: captured per batch-size bucket, replayed with padding rows.

    buckets   1, 2, 4, 8, 16, 24, 32, ..., the largest batch

    greedy    inputs -- network -- argmax of the head -- write-back
    forward   inputs -- network -- logits and their argmax
    sample                         logits and their argmax -- sampled token -- write-back

A decode step replays `greedy`, or `forward` and then `sample`; between those two the logits may be
adjusted, and the argmax with them. A graph reads batch slots from the upload buffer and leaves
everything else in the workspace.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch

from model.batch import Ints
from model.kernels.inputs import advance
from model.kernels.matmul import Product
from model.kernels.sampling import sample_tokens
from model.runners.cuda.accelerator import Accelerator
from model.runners.cuda.buffers import Upload
from model.runners.cuda.network import FusedNetwork
from model.runners.cuda.workspace import Workspace

_SMALL = (1, 2, 4)
_STEP = 8


def bucket_sizes(largest: int) -> tuple[int, ...]:
    """The batch sizes that graphs are captured for; `largest` is one of them."""
    sizes = {size for size in (*_SMALL, *range(_STEP, largest, _STEP)) if size < largest}
    return (*sorted(sizes), largest)


def bucket_for(count: int, sizes: Sequence[int]) -> int:
    """The smallest bucket that holds `count` rows."""
    return sizes[bisect_left(sizes, count)]


class CapturedGraphs:
    """Graphs of one piece of work, by bucket."""

    def __init__(self, accelerator: Accelerator, work: Callable[[int], None]) -> None:
        self._accelerator = accelerator
        self._work = work
        self._replay: dict[int, Callable[[], None]] = {}

    def is_captured(self, size: int) -> bool:
        return size in self._replay

    def capture(self, size: int) -> None:
        """Captures a bucket. The work runs meanwhile, so its rows must be padding rows."""
        self._replay[size] = self._accelerator.capture(lambda: self._work(size))

    def run(self, size: int) -> None:
        """Launches the work as it is, without a graph."""
        self._work(size)

    def replay(self, size: int) -> None:
        self._replay[size]()


class DecodeGraphs:
    """The graphs of decode steps. A step's batch slots are the first of what is uploaded."""

    def __init__(
        self,
        accelerator: Accelerator,
        network: FusedNetwork,
        workspace: Workspace,
        *,
        upload: Upload,
        pad_slot: int,
    ) -> None:
        self._network = network
        self._workspace = workspace
        self._upload = upload
        self._pad_slot = pad_slot
        self.sizes = bucket_sizes(len(workspace.tokens_R))
        self.greedy = CapturedGraphs(accelerator, self._run_greedy)
        self.forward = CapturedGraphs(accelerator, self._run_forward)
        self.sample = CapturedGraphs(accelerator, self._run_sample)

    def of_step(self, *, greedy: bool) -> tuple[CapturedGraphs, ...]:
        """The graphs that a step replays, in order."""
        return (self.greedy,) if greedy else (self.forward, self.sample)

    def all(self) -> tuple[CapturedGraphs, ...]:
        """The graphs that any step may replay."""
        general = self.of_step(greedy=False)
        return (*general, self.greedy) if self._network.fuses_head else general

    def padding(self, count: int) -> Ints:
        """The batch slots of so many padding rows."""
        return np.full(count, self._pad_slot, np.int32)

    def capture(self, size: int, graphs: Sequence[CapturedGraphs]) -> None:
        """Captures those of the graphs that are missing for a bucket, over padding rows."""
        missing = [graph for graph in graphs if not graph.is_captured(size)]
        if missing:
            self._upload.send([self.padding(size)])
        for graph in missing:
            graph.capture(size)

    def _run_greedy(self, size: int) -> None:
        workspace, argmax = self._workspace, self._workspace.argmax.first(size)
        self._network.argmax(self._hidden(size), None, out=argmax, logits_RV=None)
        advance(workspace.state, self._batch_slots(size), argmax.ids_RN[:, 0], stored=1)

    def _run_forward(self, size: int) -> None:
        workspace = self._workspace
        self._network.argmax(
            self._hidden(size),
            None,
            out=workspace.argmax.first(size),
            logits_RV=workspace.logits_RV[:size],
        )

    def _run_sample(self, size: int) -> None:
        workspace, batch_slots_R = self._workspace, self._batch_slots(size)
        tokens_R = sample_tokens(
            workspace.logits_RV[:size],
            workspace.state,
            batch_slots_R,
            argmax=workspace.argmax.first(size),
        )
        advance(workspace.state, batch_slots_R, tokens_R, stored=1)
        workspace.tokens_R[:size].copy_(tokens_R)

    def _hidden(self, size: int) -> tuple[torch.Tensor, Product]:
        return self._network.hidden(self._workspace.decode_inputs(self._batch_slots(size)))

    def _batch_slots(self, size: int) -> torch.Tensor:
        return self._upload.target[:size]
