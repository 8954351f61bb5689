"""CudaRunner: steps on a GPU by the Triton kernels, decode steps as recorded graphs.

All state of running sequences is on the device (`model.kernels.inputs`); the host sends what
changes. A step goes one of three ways, with the same kernels and the same bits:

    likeliest   a decode step of greedy rows    recorded: inputs, network, head, write-back
    decode      a token a sequence, none scored recorded: inputs, network, head | choice, write-back
    mixed       chunks of prompts among them    launched kernel by kernel

Before the choice the logits may be adjusted (masks, penalties, biases) or read (log probabilities),
also in a decode step. Where nobody does either and all rows are greedy, the head's product gives
the tokens and no logits are stored. Tokens come back through a ring, so the next step can be
launched before they are read: `launch` and `collect`.

Memory is planned at the start: weights, buffers for the largest step, what that step was measured
to need, a margin; the rest may be KV pool. No step that `RunnerOptions` allows needs more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import triton

from model.batch import Batch, Bools, Ints, SamplingBatch, StepOutput
from model.config import ModelConfig
from model.kernels.attention import SPLIT, STEP
from model.kernels.choice import choose
from model.kernels.head import find_tops, merge_tops
from model.kernels.inputs import Column, advance, change, mixed_rows
from model.kernels.matmul import multiply
from model.kvcache import KVCache, bytes_per_block
from model.runners import RunnerOptions, StepHandle, Weights
from model.runners.cuda.accelerator import Accelerator, CudaAccelerator, HostAccelerator, Reading
from model.runners.cuda.buckets import Ladder
from model.runners.cuda.buffers import Ring, Upload
from model.runners.cuda.cublas import CublasLt, Library, ProductShape, ProvenProducts
from model.runners.cuda.device_memory import blocks_that_fit, check_weights_fit
from model.runners.cuda.exactness import Trial, trial_for, try_exactness
from model.runners.cuda.graphs import DecodeLadders
from model.runners.cuda.logits import (
    Extras,
    Scores,
    adjust,
    read_extras,
    score_rows,
    wants_likeliest_alone,
)
from model.runners.cuda.network import FusedNetwork, Multiply, Reduce
from model.runners.cuda.slots import Seats
from model.runners.cuda.workspace import Workspace
from model.runners.torch import choose_device

KERNELS = 1  # rises whenever the kernels' bits change
IN_FLIGHT = 2

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    handle: StepHandle
    seats_R: Ints
    tokens: Reading
    extras: Extras
    scores: Scores


class CudaRunner:
    """Owns the weights, the KV pool and the state of the seats.

    Raises ValueError for networks and options it cannot serve and where memory does not suffice.
    With device `cpu` the kernels run in Triton's interpreter: for tests. `product` is how weight
    matrices are multiplied; any but the default gives up exactness. `reduce` sums over ranks.

    It calls itself exact only after it has tried: `proof` says on what. None tries nothing.
    `library` (None: the GPU's) multiplies `library_shapes`, where the options allow it, in steps of
    the largest size: what was proven to have the bits of our own product.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        options: RunnerOptions,
        digest: str,
        product: Multiply = multiply,
        reduce: Reduce | None = None,
        proof: Trial | Literal["by options"] | None = "by options",
        library: Library | None = None,
    ) -> None:
        device = choose_device(options.device)
        self._accelerator: Accelerator = (
            CudaAccelerator(device) if device.type == "cuda" else HostAccelerator()
        )
        self._dtype = _choose_dtype(options.dtype)
        self._kv_dtype = _choose_kv_dtype(options.kv_dtype, self._dtype)
        self.config = config
        self.block_size = options.block_size
        self._options = options
        needed = sum(weights[name].numel() for name in weights) * self._dtype.itemsize
        check_weights_fit(needed, self._accelerator.free_memory())
        self._network = FusedNetwork(
            config, weights, dtype=self._dtype, device=device, product=product, reduce=reduce
        )
        self.library_shapes: frozenset[ProductShape] = frozenset()
        if product is multiply:
            self._try_library(library)
        self._make_buffers(device)
        self.num_blocks = options.num_blocks or self._measure_blocks()
        self._make_pool(self.num_blocks)
        self._ladders = DecodeLadders(
            self._accelerator,
            self._network,
            self._space,
            batch_slots_S=self._upload.target,
            pool=self._cache.pool,
            block_size=self.block_size,
        )
        self._flying: deque[_InFlight] = deque()
        self._steps = 0
        self.exact = product is multiply and reduce is None and proof is not None
        self.numeric_class = self._name_class(device, digest)
        if self.exact:
            self.exact = self._proves(proof)
            if not self.exact and self.library_shapes:  # whose fault it was the next proof will say
                self.library_shapes = frozenset()
                self._network.multiply_layers_by(multiply)
                self.exact = self._proves(proof)
            self.numeric_class = self._name_class(device, digest)

    def run(self, batch: Batch) -> StepOutput:
        """Computes the step and stores its K and V."""
        return self.collect(self.launch(batch))

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        """Starts a step; see `OverlappedRunner`."""
        self._check_launch(batch, unread_T)
        with torch.inference_mode():
            sequences_R = (
                np.searchsorted(batch.query_starts_S1, batch.sample_rows_R, side="right") - 1
            )
            seats_R = batch.batch_slots_S[sequences_R]
            decode = (
                batch.is_decode
                and len(seats_R) == batch.num_sequences
                and not batch.score_ids_Q.size
            )
            places, values = self._seats.changes(batch, seats_R, unread_T=unread_T, decode=decode)
            handle = StepHandle(self._steps)
            if decode:
                flying = self._decode(batch, handle, (places, values))
            else:
                flying = self._mixed(batch, handle, (places, values), seats_R, unread_T)
        self._seats.sampled(seats_R, step=handle.number, decode=decode)
        self._flying.append(flying)
        self._steps += 1
        return handle

    def collect(self, handle: StepHandle) -> StepOutput:
        """Waits for the oldest step under way."""
        if not self._flying or self._flying[0].handle != handle:
            raise ValueError("steps are collected in the order they were launched")
        flying = self._flying.popleft()
        with torch.inference_mode():
            tokens_R = flying.tokens.wait().numpy().copy()
            extras, scores = flying.extras.wait(), flying.scores.wait()
        self._seats.read(flying.seats_R, tokens_R, step=handle.number)
        return StepOutput(
            tokens_R=tokens_R,
            logprobs_R=extras.logprobs,
            top_ids_RN=extras.top_ids,
            top_logprobs_RN=extras.top_logprobs,
            score_logprobs_Q=scores.logprobs,
            score_top_ids_QN=scores.top_ids,
            score_top_logprobs_QN=scores.top_logprobs,
        )

    def warm_up(self) -> None:
        """Compiles the kernels for every size and records the ladders."""
        with torch.inference_mode():
            most = self._options.max_batch_tokens
            for num_tokens in (1, 17, 33, 65, 129, max(1, most - 1), most):
                self._dry_step(min(num_tokens, most))
            for size in reversed(self._ladders.sizes):  # the largest first: others share its memory
                self._record(size, self._ladders.all())

    def close(self) -> None:
        """Gives the device's memory back; the runner must not run again."""
        self._flying.clear()
        del self._network, self._cache, self._space, self._ladders

    def _try_library(self, library: Library | None) -> None:
        """Lets the library multiply what it is proven for.

        Full steps alone: of so many rows are only steps with prompts, and those are not recorded.
        """
        options, device = self._options, self._accelerator.device
        if not options.library_products or options.max_batch_tokens <= options.max_sequences:
            return
        if library is None:
            if device.type != "cuda":
                return
            library = CublasLt()
        with torch.inference_mode():
            proven = ProvenProducts(
                self._network.layer_products, rows=options.max_batch_tokens, library=library
            )
        self.library_shapes = proven.shapes
        if proven.shapes:
            self._network.multiply_layers_by(proven)

    def _make_buffers(self, device: torch.device) -> None:
        """Everything that is there once, sized for the largest step."""
        config, options = self.config, self._options
        table_width = -(-config.max_model_len // self.block_size)
        sequences = options.max_sequences
        self._seats = Seats(sequences, table_width=table_width)
        self._state = torch.from_numpy(self._seats.mirror.copy()).to(device)
        most_changes = sequences * (Column.TABLE + table_width)
        self._upload = Upload(
            self._accelerator,
            capacity=4 * options.max_batch_tokens + 5 * sequences + 1 + 2 * most_changes,
            slots=2 * IN_FLIGHT,
        )
        self._ring = Ring(self._accelerator, width=sequences, slots=2 * IN_FLIGHT)
        self._space = Workspace(config, options, windows=self._network.windows, state=self._state)

    def _measure_blocks(self) -> int:
        """Blocks of the pool, from what the largest step leaves."""
        self._make_pool(0)
        largest = self._options.max_batch_tokens
        with torch.inference_mode():
            self._dry_step(largest)  # compiles, and lets libraries take what they keep
            work = self._accelerator.peak_of(lambda: self._dry_step(largest))
            if self.library_shapes:  # a row less, and all products are ours
                ours = self._accelerator.peak_of(lambda: self._dry_step(largest - 1))
                work = max(work, ours)
        return blocks_that_fit(
            free=self._accelerator.free_memory(),
            work=work,
            block_bytes=bytes_per_block(self.config, self.block_size, dtype=self._kv_dtype),
            wanted=self._options.kv_memory,
            share=self._options.memory_share,
        )

    def _make_pool(self, num_blocks: int) -> None:
        """The pool, with one block more for rows that are nobody's."""
        self._cache = KVCache(
            self.config,
            block_size=self.block_size,
            num_blocks=num_blocks + 1,
            dtype=self._kv_dtype,
            device=self._accelerator.device,
        )
        nobodys = slice(num_blocks * self.block_size, None)
        self._cache.pool[:, :, nobodys] = 0  # so that rows that only fill up stay finite
        self._seats.give_nobody(num_blocks)
        self._state.copy_(torch.from_numpy(self._seats.mirror))

    def _proves(self, proof: Trial | Literal["by options"] | None) -> bool:
        """Whether an answer's bits depended on nothing that was tried."""
        if not isinstance(proof, Trial):
            proof = trial_for(
                self._options, num_blocks=self.num_blocks, max_model_len=self.config.max_model_len
            )
        return all(try_exactness(self, proof).values())

    def _name_class(self, device: torch.device, digest: str) -> str:
        chip = "interpreter"
        if device.type == "cuda":
            chip = "sm{}{}".format(*torch.cuda.get_device_capability(device))
        kinds = f"{_SHORT[self._dtype]}-kv{8 * self._kv_dtype.itemsize}"
        kernels = f"{KERNELS}.{SPLIT}.{STEP}-triton{triton.__version__}"
        kind = "triton" if self.exact else "triton-inexact"
        return f"{kind}-{chip}-{kinds}-{kernels}-{digest[:12]}"

    def _check_launch(self, batch: Batch, unread_T: Bools | None) -> None:
        if len(self._flying) == IN_FLIGHT:
            raise ValueError(f"at most {IN_FLIGHT} steps are under way")
        if batch.num_tokens > self._options.max_batch_tokens:
            raise ValueError(f"a step has at most {self._options.max_batch_tokens} tokens")
        if batch.num_sequences > self._options.max_sequences:
            raise ValueError(f"a step has at most {self._options.max_sequences} sequences")
        if unread_T is not None and unread_T.any():
            sampling = batch.sampling
            rows = np.concatenate([sampling.penalty_rows_P, sampling.mask_rows_M])
            if unread_T[batch.sample_rows_R[rows]].any() or unread_T[batch.score_rows_Q].any():
                raise ValueError("a row whose token is unread has no penalties, masks or scores")

    def _decode(self, batch: Batch, handle: StepHandle, changes: tuple[Ints, Ints]) -> _InFlight:
        count = batch.num_sequences
        likeliest_alone = self._takes_likeliest(batch.sampling)
        network, *choice = self._ladders.of(likeliest_alone=likeliest_alone)
        size = network.size_for(count)
        self._record(size, [network, *choice])
        filler = np.full(size - count, self._seats.nobody, np.int32)
        sent = self._upload.send([batch.batch_slots_S, filler, *changes])
        change(self._state, sent[2], sent[3])
        network.run(size)
        if likeliest_alone:
            tokens_R, extras = self._space.tops.ids_RN[:count, 0], Extras.none()
        else:
            raw_RV, tokens_R = self._adjust(batch.sampling), self._space.tokens_R[:count]
            choice[0].run(size)
            extras = read_extras(raw_RV, tokens_R, batch.sampling, self._accelerator)
        return _InFlight(
            handle=handle,
            seats_R=batch.batch_slots_S,
            tokens=self._ring.post(tokens_R),
            extras=extras,
            scores=Scores.none(),
        )

    def _mixed(
        self,
        batch: Batch,
        handle: StepHandle,
        changes: tuple[Ints, Ints],
        seats_R: Ints,
        unread_T: Bools | None,
    ) -> _InFlight:
        lengths_S = np.diff(batch.query_starts_S1)
        unread = np.zeros(batch.num_tokens, np.int32) if unread_T is None else unread_T
        places, values, *step = self._upload.send(
            [
                *changes,
                np.repeat(batch.batch_slots_S, lengths_S),
                batch.tokens_T,
                batch.positions_T,
                unread.astype(np.int32),
                batch.query_starts_S1,
                batch.context_lens_S,
                batch.batch_slots_S,
                batch.sample_rows_R,
                seats_R,
            ]
        )
        seats_T, tokens_T, positions_T, unread_rows_T, starts_S1, contexts_S, batch_slots_S = step[
            :7
        ]
        rows_R, seats_on_device_R = step[7:]
        change(self._state, places, values)
        tokens_T, slots_T = mixed_rows(
            self._state, seats_T, tokens_T, positions_T, unread_rows_T, block_size=self.block_size
        )
        merges = self._space.num_merges(lengths_S.tolist())
        self._space.fill(starts_S1, contexts_S, batch_slots_S)
        inputs = self._space.inputs(tokens_T, positions_T, slots_T, merges=merges)
        hidden = self._network.hidden(inputs, self._cache.pool, block_size=self.block_size)
        logits_RV, tops = self._space.logits_RV[: len(seats_R)], self._space.tops.of(len(seats_R))
        if self._takes_likeliest(batch.sampling):
            self._network.tops(hidden, rows_R, out=tops, logits_RV=None)
            tokens_R, extras = tops.ids_RN[:, 0], Extras.none()
        else:
            self._network.tops(hidden, rows_R, out=tops, logits_RV=logits_RV)
            raw_RV = self._adjust(batch.sampling)
            tokens_R = choose(logits_RV, self._state, seats_on_device_R, tops=tops)
            extras = read_extras(raw_RV, tokens_R, batch.sampling, self._accelerator)
        advance(self._state, seats_on_device_R, tokens_R, stored=0)
        return _InFlight(
            handle=handle,
            seats_R=seats_R,
            tokens=self._ring.post(tokens_R),
            extras=extras,
            scores=score_rows(self._network, hidden, batch, self._accelerator),
        )

    def _takes_likeliest(self, sampling: SamplingBatch) -> bool:
        """Whether the head's tops are the tokens, and no logits are stored."""
        return self._network.fuses_head and wants_likeliest_alone(sampling)

    def _adjust(self, sampling: SamplingBatch) -> torch.Tensor:
        """Adjusts the stored logits, and their tops with them; returns the unmodified logits."""
        count = len(sampling.seeds_R)
        logits_RV = self._space.logits_RV[:count]
        raw_RV = adjust(logits_RV, sampling)
        if raw_RV is not logits_RV:
            tops = self._space.tops.of(count)
            merge_tops(find_tops(logits_RV), vocab_size=self.config.vocab_size, out=tops)
        return raw_RV

    def _record(self, size: int, ladders: Sequence[Ladder]) -> None:
        """Records what of a rung is not, on rows that are nobody's."""
        missing = [ladder for ladder in ladders if not ladder.has(size)]
        if missing:
            self._upload.send([np.full(size, self._seats.nobody, np.int32)])
        for ladder in missing:
            ladder.record(size)

    def _dry_step(self, num_tokens: int) -> None:
        """A mixed step of nobody's tokens: to compile, to warm up, to measure."""
        length = min(num_tokens, self.config.max_model_len)
        count = min(self._options.max_sequences, num_tokens)
        device = self._accelerator.device
        lengths = np.full(count, num_tokens // count)
        lengths[: num_tokens % count] += 1
        lengths = np.minimum(lengths, length)
        starts = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))).int().to(device)
        total = int(lengths.sum())
        zeros = torch.zeros(total, dtype=torch.int32, device=device)
        batch_slots_S = torch.full((count,), self._seats.nobody, dtype=torch.int32, device=device)
        self._space.fill(starts, starts[1:] - starts[:-1], batch_slots_S)
        merges = self._space.num_merges(lengths.tolist())
        tokens, slots = mixed_rows(
            self._state,
            batch_slots_S[:1].repeat(total),
            zeros,
            zeros,
            zeros,
            block_size=self.block_size,
        )
        inputs = self._space.inputs(tokens, zeros, slots, merges=merges)
        hidden = self._network.hidden(inputs, self._cache.pool, block_size=self.block_size)
        tops, logits_RV = self._space.tops.of(count), self._space.logits_RV[:count]
        rows_R = starts[1:] - 1
        self._network.tops(hidden, rows_R, out=tops, logits_RV=logits_RV)
        choose(logits_RV, self._state, batch_slots_S, tops=tops)
        if self._network.fuses_head:
            self._network.tops(hidden, rows_R, out=tops, logits_RV=None)


def _choose_dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16
    if name not in _DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(_DTYPES)} for the cuda runner")
    return _DTYPES[name]


def _choose_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    kinds = {"auto": dtype, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
    if name not in kinds:
        raise ValueError(f"kv_dtype must be one of {', '.join(kinds)} for the cuda runner")
    return kinds[name]
