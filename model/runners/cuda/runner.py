"""CudaRunner: launches and collects steps on a GPU, decode steps as CUDA graphs.

All state of running sequences is on the device (`model.kernels.inputs`); the host uploads what
changes. A step takes one of three paths, with the same kernels and the same bits:

    greedy    one token per sequence, none scored   one graph: inputs, network, argmax, write-back
    decode    one token per sequence, none scored   two graphs: inputs, network | sampling
    mixed     chunks of prompts or drafts, too      one graph: inputs, network; then launches

Before sampling the logits may be adjusted (masks, penalties, biases) or read (log probabilities),
also in a decode step. If no row requests either and all rows are greedy, the head's argmax gives
the tokens and no logits are stored. Tokens come back through a ring of pinned buffers, so the next
step can be launched before they are read: `launch` and `collect`. A step with drafts samples after
each of them, and must be read first: the host decides which drafts are accepted.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from model.batch import Batch, Bools, Ints, SamplingBatch, StepOutput
from model.kernels.head import find_argmax, merge_argmax
from model.kernels.inputs import advance, change
from model.kernels.sampling import sample_tokens
from model.kernels.tiling import layout_sizes
from model.runners import RunnerOptions, StepHandle, check_unread
from model.runners.cuda.accelerator import Accelerator, PendingCopy
from model.runners.cuda.buffers import TokenRing, Upload
from model.runners.cuda.chip import resource_errors
from model.runners.cuda.cublas import ProductShape
from model.runners.cuda.graphs import DecodeGraphs, bucket_for
from model.runners.cuda.logits import (
    NOTHING_TO_READ,
    PendingLogprobs,
    adjust,
    is_plain_greedy,
    read_logprobs,
    read_scores,
)
from model.runners.cuda.mixed import MixedGraphs, MixedShapes
from model.runners.cuda.network import FusedNetwork
from model.runners.cuda.padding import padding_batch, padding_lengths
from model.runners.cuda.slots import BatchSlots
from model.runners.cuda.workspace import MixedColumns, Workspace
from model.runners.logprobs import SCORED_AT_ONCE, step_output

IN_FLIGHT = 2


class _Results(NamedTuple):
    """What a step computes, on its way to the host."""

    tokens: PendingCopy
    logprobs: PendingLogprobs = NOTHING_TO_READ
    scores: PendingLogprobs = NOTHING_TO_READ


class CudaRunner:
    """Runs steps over a network, a KV pool and batch slots that `build.build_runner` made."""

    exact = False  # until it is verified
    beside_host = True
    numeric_class = ""

    def __init__(
        self,
        options: RunnerOptions,
        *,
        accelerator: Accelerator,
        network: FusedNetwork,
        workspace: Workspace,
        slots: BatchSlots,
        shapes: MixedShapes,
    ) -> None:
        self.config = network.config
        self.block_size = options.block_size
        self.num_blocks = 0
        self.vendor_blas_shapes: frozenset[ProductShape] = frozenset()  # that it multiplies
        self.most_sampled = options.max_sequences
        self._options = options
        self._accelerator = accelerator
        self._network = network
        self._workspace = workspace
        self._slots = slots
        sequences = options.max_sequences
        columns = 4 * options.max_batch_tokens + 3 * shapes.num_sequences + 1
        self._upload = Upload(
            accelerator,
            capacity=columns + 2 * sequences + 2 * slots.most_changes,
            num_arrays=2 + len(MixedColumns._fields) + 2,
            num_buffers=2 * IN_FLIGHT,
        )
        self._ring = TokenRing(accelerator, width=sequences, num_buffers=2 * IN_FLIGHT)
        self._graphs = DecodeGraphs(
            accelerator, network, workspace, upload=self._upload, pad_slot=slots.pad_slot
        )
        self._mixed_graphs = MixedGraphs(
            accelerator,
            network,
            workspace,
            upload=self._upload,
            shapes=shapes,
            padding=self._padding_batch,
        )
        self._in_flight: deque[tuple[StepHandle, Ints, _Results]] = deque()
        self._num_steps = 0

    def run(self, batch: Batch) -> StepOutput:
        return self.collect(self.launch(batch))

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        """Starts a step; see `OverlappedRunner`."""
        self._check_launch(batch, unread_T)
        self._accelerator.activate()
        slots_R = self._slots.sampling_slots(batch)
        all_sample = len(slots_R) == batch.num_sequences
        decode = batch.is_decode and all_sample and not batch.score_ids_Q.size
        handle = StepHandle(self._num_steps)
        with torch.inference_mode():
            changes = self._slots.changes(batch, slots_R, unread_T=unread_T, decode=decode)
            if decode:
                results = self._decode(batch, changes)
            else:
                self._mixed_graphs.capture(batch.num_tokens)
                results = self._mixed(batch, changes, slots_R, unread_T)
        self._slots.sampled(slots_R, step=handle.number, decode=decode)
        self._in_flight.append((handle, slots_R, results))
        self._num_steps += 1
        return handle

    def collect(self, handle: StepHandle) -> StepOutput:
        """Waits for the oldest step in flight."""
        if not self._in_flight or self._in_flight[0][0] != handle:
            raise ValueError("steps are collected in the order they were launched")
        self._accelerator.activate()
        _, slots_R, results = self._in_flight.popleft()
        with torch.inference_mode():
            tokens_R = results.tokens().numpy().copy()
            logprobs, scores = results.logprobs.wait(), results.scores.wait()
        self._slots.read(slots_R, tokens_R, step=handle.number)
        return step_output(tokens_R, logprobs, scores)

    def allocate_pool(self, num_blocks: int) -> None:
        """Allocates the KV pool, before any step but those of padding rows."""
        self._workspace.allocate_pool(num_blocks)
        self.num_blocks = num_blocks

    def warm_up(self) -> None:
        """Compiles every variant of the kernels and captures all graphs.

        Raises ValueError if the device has too little memory.
        """
        self._accelerator.activate()
        with torch.inference_mode(), resource_errors():
            self.launch_variants()
        self.capture_graphs()

    def capture_graphs(self) -> None:
        """Captures all graphs that are missing. Raises ValueError as `warm_up` does."""
        with torch.inference_mode(), resource_errors():
            for size in reversed(self._graphs.sizes):  # largest first: the others share its memory
                self._graphs.capture(size, self._graphs.all())
            self._mixed_graphs.capture_all()

    @property
    def has_mixed_graphs(self) -> bool:
        """Whether steps with prompts or drafts are captured as graphs."""
        return self._mixed_graphs.enabled

    def drop_mixed_graphs(self, reason: str) -> None:
        """Launches those steps kernel by kernel from here on."""
        self._mixed_graphs.drop(reason)

    def padding_step(
        self, num_tokens: int, *, adjusted: bool = False, logprobs: bool = False, scored: int = 0
    ) -> None:
        """Launches a mixed step of padding rows, in as many sequences as possible.

        For the rest see `padding_batch`.
        """
        batch = self._padding_batch(num_tokens, adjusted=adjusted, logprobs=logprobs, scored=scored)
        with torch.inference_mode():
            self._mixed(batch, self._slots.padding_change(), batch.batch_slots_S, None)

    def launch_largest(self) -> None:
        """Launches what the largest graphs have: their memory is apart from that of other steps."""
        with torch.inference_mode():
            self._mixed_graphs.run_largest()
            size = self._graphs.sizes[-1]
            self._upload.send([self._graphs.padding(size)])
            for graph in self._graphs.all():
                graph.run(size)

    def launch_variants(self) -> None:
        """Launches all that a step may launch in every variant that is compiled on its own.

        Of the rows of a step, variants depend on the layout of products; of the rows that sample,
        on that of the head; of the sequences, on a power of two. Graphs are among them.
        """
        most, sequences = self._options.max_batch_tokens, self._options.max_sequences
        layouts = {self._network.layouts(size): size for size in reversed(layout_sizes(most))}
        # Vendor BLAS multiplies full steps only.
        for size in sorted({*layouts.values(), *layout_sizes(sequences), max(1, most - 1), most}):
            self.padding_step(size)
        for scored in layout_sizes(min(most, SCORED_AT_ONCE)):
            self.padding_step(scored, adjusted=True, scored=scored)
        for size in self._graphs.sizes:
            self._upload.send([self._graphs.padding(size)])
            for graph in self._graphs.all():
                graph.run(size)

    def close(self) -> None:
        self._in_flight.clear()
        del self._network, self._workspace, self._graphs, self._mixed_graphs

    def _check_launch(self, batch: Batch, unread_T: Bools | None) -> None:
        if len(self._in_flight) == IN_FLIGHT:
            raise ValueError(f"at most {IN_FLIGHT} steps are in flight")
        if batch.num_tokens > self._options.max_batch_tokens:
            raise ValueError(f"a step has at most {self._options.max_batch_tokens} tokens")
        if batch.num_sequences > self._options.max_sequences:
            raise ValueError(f"a step has at most {self._options.max_sequences} sequences")
        if len(batch.sample_rows_R) > self._options.max_sequences:
            raise ValueError(f"a step samples at most {self._options.max_sequences} rows")
        if batch.adapters_S.size and batch.adapters_S.max() > len(self._options.adapters):
            raise ValueError("a sequence has an adapter that is not loaded")
        if unread_T is not None:
            check_unread(batch, unread_T)

    def _decode(self, batch: Batch, changes: tuple[Ints, Ints]) -> _Results:
        count = batch.num_sequences
        greedy = self._samples_by_argmax(batch.sampling)
        first, *rest = self._graphs.of_step(greedy=greedy)
        size = bucket_for(count, self._graphs.sizes)
        self._graphs.capture(size, [first, *rest])
        slots = np.concatenate([batch.batch_slots_S, self._graphs.padding(size - count)])
        _, places, values = self._upload.send([slots, *changes])
        change(self._workspace.state, places, values)
        first.replay(size)
        if greedy:
            return _Results(self._ring.read(self._workspace.argmax.ids_RN[:count, 0]))
        raw_RV, tokens_R = self._adjust(batch.sampling), self._workspace.tokens_R[:count]
        for graph in rest:
            graph.replay(size)
        logprobs = read_logprobs(raw_RV, tokens_R, batch.sampling, self._accelerator)
        return _Results(self._ring.read(tokens_R), logprobs)

    def _mixed(
        self, batch: Batch, changes: tuple[Ints, Ints], slots_R: Ints, unread_T: Bools | None
    ) -> _Results:
        network, workspace, graphs = self._network, self._workspace, self._mixed_graphs
        *columns, rows_R, batch_slots_R, places, values = self._upload.send(
            [*graphs.shapes.columns(batch, unread_T), batch.sample_rows_R, slots_R, *changes]
        )
        change(workspace.state, places, values)
        hidden = graphs.hidden(columns, batch.num_tokens)
        argmax = workspace.argmax.first(len(slots_R))
        if self._samples_by_argmax(batch.sampling):
            network.argmax(hidden, rows_R, out=argmax, logits_RV=None)
            tokens_R, logprobs = argmax.ids_RN[:, 0], NOTHING_TO_READ
        else:
            logits_RV = workspace.logits_RV[: len(slots_R)]
            network.argmax(hidden, rows_R, out=argmax, logits_RV=logits_RV)
            raw_RV = self._adjust(batch.sampling)
            tokens_R = sample_tokens(logits_RV, workspace.state, batch_slots_R, argmax=argmax)
            logprobs = read_logprobs(raw_RV, tokens_R, batch.sampling, self._accelerator)
        advance(workspace.state, batch_slots_R, tokens_R, stored=0)
        tokens = self._ring.read(tokens_R)
        return _Results(tokens, logprobs, read_scores(network, hidden, batch, self._accelerator))

    def _padding_batch(
        self, num_tokens: int, *, adjusted: bool = False, logprobs: bool = False, scored: int = 0
    ) -> Batch:
        return padding_batch(
            padding_lengths(
                num_tokens,
                max_sequences=self._options.max_sequences,
                max_context=self.config.max_model_len,
            ),
            pad_slot=self._slots.pad_slot,
            vocab_size=self.config.vocab_size,
            adjusted=adjusted,
            logprobs=logprobs,
            scored=scored,
        )

    def _samples_by_argmax(self, sampling: SamplingBatch) -> bool:
        """Whether the head's argmax is the sampled token, and no logits are stored."""
        return self._network.fuses_head and is_plain_greedy(sampling)

    def _adjust(self, sampling: SamplingBatch) -> torch.Tensor:
        """Adjusts the stored logits, and their argmax with them; returns the unmodified logits."""
        count = len(sampling.seeds_R)
        logits_RV = self._workspace.logits_RV[:count]
        raw_RV = adjust(logits_RV, sampling)
        if raw_RV is not logits_RV:
            argmax = self._workspace.argmax.first(count)
            merge_argmax(find_argmax(logits_RV), vocab_size=self.config.vocab_size, out=argmax)
        return raw_RV
