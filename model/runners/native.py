"""NativeRunner: a step in one call of a C++ library, with 8-bit activations, on a CPU.

Weights have 8 bits or, with dtype int4, those of their blocks (`model.checkpoint.four_bit`). Keys
and values have 8 bits, too, or 16 (`_wide_cache`).

The bits of an answer do not depend on the batch, the chunks, the blocks, the threads or the
instruction set: see native/src/kernels.h. `unsupported` names the families that it does not serve,
those with other norms or activations than Llama's. The library samples, too, with the bits of
`model.sampler`: only logits of open rows leave it. Adapters are applied in float32, next to the
products in 8 bits.

Steps that were launched are computed by the library's own threads, while the host reads earlier
ones and plans the next.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from model.batch import Batch, Bools, Floats, Ints, SamplingBatch, StepOutput
from model.config import Activation, ModelConfig, Norm, Position
from model.limits import usable_cores, usable_cpus
from model.native.library import (
    NO_WINDOW,
    NativeLibrary,
    NativeModel,
    NativeStep,
    Shape,
)
from model.native.packed import PackedWeights
from model.native.quantize import hadamard_block, load, load_adapters, rotary_tables
from model.native.sampling import NativeSampling, is_greedy, logits_room
from model.runners import RunnerOptions, StepHandle, check_unread
from model.runners.logprobs import NO_LOGPROBS, SCORED_AT_ONCE, Logprobs, step_output
from model.weights import Arrays, Weights

KERNEL_VERSION = 4  # raised whenever the bits of a result change, which a test enforces
MAX_THREADS = 16  # more of them wait for one another longer than they compute
COMPUTE_ROWS = 32  # from this many rows on, a step is compute-bound; below, memory-bound
FOUR_BIT_VARIANTS = frozenset({"avx2"})  # that multiply 4 bits faster than 8, at any number of rows
_MAX_INPUTS = 65_536  # of a product: its sums must fit 32 bits

_NO_LAYERS: Mapping[str, Any] = {  # of a step of the head alone
    "tokens_T": np.zeros(0, np.int32),
    "positions_T": np.zeros(0, np.int32),
    "query_starts_S1": np.zeros(1, np.int32),
    "block_table_SB": np.zeros((0, 0), np.int32),
}
_KV_DTYPES = ("auto", "bfloat16", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    """A step for the library, which writes its results into the arrays of `output`."""

    handle: StepHandle
    batch: Batch
    steps: Sequence[NativeStep]  # the first one runs the layers
    head: NativeStep | None  # the one of them that samples; None: it is to be launched
    sampled: Logprobs
    scored: Sequence[Logprobs]
    open_LV: Floats
    kept: Ints | None  # an array that the library reads

    def output(self, seconds: float | None = None) -> StepOutput:
        if self.head is None:
            raise ValueError("a step whose sampling was deferred has to sample before it is read")
        scored = Logprobs.join(self.scored)
        output = step_output(self.head.tokens_R, self.sampled, scored, seconds=seconds)
        return replace(output, open_logits_LV=self.open_LV) if len(self.open_LV) else output


class NativeRunner:
    """Owns the packed weights, the KV pool and the threads of the native step.

    Raises ValueError for an unsupported model or option, NativeUnavailable if the library cannot
    be built or run. `variant` forces an instruction set; the default is the best available.
    """

    exact = True
    beside_host = False
    keeps_logits = True

    def __init__(
        self, config: ModelConfig, weights: Weights | Arrays, *, options: RunnerOptions,
        digest: str, variant: str = "", library: NativeLibrary | None = None,
    ) -> None:  # fmt: skip
        reason = unsupported(config) or _unsupported_options(options)
        if reason:
            raise ValueError(reason)
        library = library or NativeLibrary()
        shape = _shape(config, options, library)
        self.config = config
        self.block_size = options.block_size
        self.num_blocks = shape.num_blocks
        kind = f"native-{'int4' if shape.four_bit else 'int8'}{'' if shape.wide_cache else '-kv8'}"
        self.numeric_class = f"{kind}-v{KERNEL_VERSION}-{digest[:12]}"
        self.most_sampled = options.max_batch_tokens
        self._flights: deque[_Flight] = deque()
        self._newest: Batch | None = None  # the batch that was launched last
        self._launched = 0  # steps
        self._model = NativeModel(library, shape, variant=variant)
        self._open_LV = [np.empty((0, config.vocab_size), np.float32)] * 2
        self._load(weights, options, digest)
        load_adapters(self._model, config, weights, options.adapters)

    @property
    def variant(self) -> str:
        """The instruction set in use."""
        return self._model.variant

    def run(self, batch: Batch) -> StepOutput:
        flight = self._flight(batch, 0)
        for step in flight.steps:
            self._model.step(step)
        return flight.output()

    def launch(
        self, batch: Batch, *, unread_T: Bools | None = None, deferred: bool = False
    ) -> StepHandle:
        unread_rows_T = None if unread_T is None else self._unread(batch, unread_T)
        flight = self._flight(batch, self._launched, unread_rows_T, deferred=deferred)
        for step in flight.steps:
            self._model.launch(step, unread_T=unread_rows_T)
            unread_rows_T = None
        self._flights.append(flight)
        self._newest = batch
        self._launched += 1
        return flight.handle

    def sample(self, handle: StepHandle, sampling: SamplingBatch) -> None:
        if not self._flights or self._flights[-1].handle != handle or self._flights[-1].head:
            raise ValueError("only the newest step samples later, if that was deferred")
        flight = self._flights.pop()
        head, logprobs, open_LV = self._head(handle.number, flight.batch, sampling, _NO_LAYERS)
        self._model.launch(head)
        self._flights.append(
            replace(
                flight,
                steps=[*flight.steps, head],
                head=head,
                sampled=logprobs,
                open_LV=open_LV,
            )
        )

    def collect(self, handle: StepHandle) -> StepOutput:
        if not self._flights or self._flights[0].handle != handle:
            raise ValueError("steps are collected in the order they were launched")
        flight = self._flights.popleft()
        return flight.output(sum(self._model.collect() for _ in flight.steps))

    def warm_up(self) -> None:
        """Touches weights and threads with a decoded token and a chunk."""
        room = min(self.num_blocks * self.block_size, self._model.shape.max_rows, COMPUTE_ROWS)
        for length in {1, min(room, len(self._model.shape.cosines))}:
            step = NativeStep(
                tokens_T=np.zeros(length, np.int32),
                positions_T=np.arange(length, dtype=np.int32),
                query_starts_S1=np.array([0, length], np.int32),
                block_table_SB=np.arange(self.num_blocks, dtype=np.int32)[None],
                output_rows_R=np.array([length - 1], np.int32),
            )
            self._model.step(step)

    def close(self) -> None:
        self._model.close()

    def _room(self, rows: int, number: int) -> Floats:
        """Memory for the logits of open rows of a step, which the next one leaves alone."""
        if len(self._open_LV[number % 2]) < rows:
            self._open_LV[number % 2] = logits_room(rows, self.config.vocab_size)
        return self._open_LV[number % 2][:rows]

    def _load(self, weights: Weights | Arrays, options: RunnerOptions, digest: str) -> None:
        """Packs the weights, or reads what an earlier process packed."""
        if options.weights_cache is None:
            load(self._model, self.config, weights)
            return
        packed = PackedWeights(options.weights_cache, self._model, self.config, digest=digest)
        if packed.pays and packed.read():
            return
        load(self._model, self.config, weights)
        if packed.pays:
            packed.write()

    def _flight(
        self,
        batch: Batch,
        number: int,
        unread_rows_T: Ints | None = None,
        *,
        deferred: bool = False,
    ) -> _Flight:
        """What the library computes for a batch: the layers, then scores of given tokens."""
        layers: dict[str, Any] = {
            "tokens_T": batch.tokens_T if unread_rows_T is None else batch.tokens_T.copy(),
            "positions_T": batch.positions_T,
            "query_starts_S1": batch.query_starts_S1,
            "block_table_SB": batch.block_table_SB,
            "keeps_rows": len(batch.score_rows_Q) > 0,
        }
        if batch.adapters_S.size:
            layers["adapters_S"] = batch.adapters_S
        if deferred:
            first = NativeStep(**layers, output_rows_R=batch.sample_rows_R, head_later=True)
            logprobs, open_LV = NO_LOGPROBS, self._room(0, number)
        else:
            first, logprobs, open_LV = self._head(number, batch, batch.sampling, layers)
        scores = list(self._scores(batch))
        return _Flight(
            handle=StepHandle(number),
            batch=batch,
            steps=[first, *(step for step, _ in scores)],
            head=None if deferred else first,
            sampled=logprobs,
            scored=[logprobs for _, logprobs in scores],
            open_LV=open_LV,
            kept=unread_rows_T,
        )

    def _head(
        self, number: int, batch: Batch, sampling: SamplingBatch, layers: Mapping[str, Any]
    ) -> tuple[NativeStep, Logprobs, Floats]:
        """A step that samples, where its log probabilities appear and the logits of open rows."""
        columns = None
        if not is_greedy(sampling):
            columns = NativeSampling.of(sampling, vocab_size=self.config.vocab_size)
        open_LV = self._room(len(sampling.open_rows_L), number)
        step = NativeStep(
            **layers,
            output_rows_R=batch.sample_rows_R,
            logits=dict(zip(sampling.open_rows_L.tolist(), open_LV, strict=True)),
            sampling=columns,
        )
        return step, NO_LOGPROBS if columns is None else columns.logprobs, open_LV

    def _unread(self, batch: Batch, unread_T: Bools) -> Ints:
        """For each row the output of the newest step that is its token, or -1."""
        check_unread(batch, unread_T)
        newest = self._newest
        if newest is None or not self._flights:
            raise ValueError("only a step in flight has unread tokens")
        if batch.batch_slots_S is newest.batch_slots_S and all(
            len(each.sample_rows_R) == each.num_sequences == each.num_tokens
            for each in (batch, newest)
        ):
            outputs_T = np.arange(len(unread_T), dtype=np.int32)
        else:
            found = dict(zip(_slots(newest, newest.sample_rows_R), itertools.count(), strict=False))
            outputs_T = np.full(len(unread_T), -1, np.int32)
            rows = np.flatnonzero(unread_T)
            for row, slot in zip(rows, _slots(batch, rows), strict=True):
                if slot not in found:
                    raise ValueError(f"slot {slot} has no token in flight")
                outputs_T[row] = found[slot]
        return np.where(unread_T, outputs_T, np.int32(-1))

    def _scores(self, batch: Batch) -> Iterator[tuple[NativeStep, Logprobs]]:
        """Steps that score given tokens after rows of the layers' step, and where scores appear."""
        V = self.config.vocab_size
        for start in range(0, len(batch.score_rows_Q), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            rows_Q = batch.score_rows_Q[part]
            plain = SamplingBatch.plain(len(rows_Q), vocab_size=V, num_top=batch.score_num_top)
            given = NativeSampling.of(plain, vocab_size=V, given_R=batch.score_ids_Q[part])
            yield NativeStep(**_NO_LAYERS, output_rows_R=rows_Q, sampling=given), given.logprobs


def _slots(batch: Batch, rows: npt.NDArray[np.integer]) -> list[int]:
    """The batch slots of the sequences of some rows of T."""
    sequences = np.searchsorted(batch.query_starts_S1, rows, side="right") - 1
    slots: list[int] = batch.batch_slots_S[sequences].tolist()
    return slots


def unsupported(config: ModelConfig) -> str | None:
    """Why the native step cannot run a model, or None if it can."""
    shared = config.num_heads // config.num_kv_heads
    widest = max(config.hidden_size, config.intermediate_size, config.query_size)
    reasons = {
        "norms other than RMSNorm": config.norm is not Norm.RMS,
        "learned positions": config.position is not Position.ROTARY,
        "activations other than SiLU": config.activation is not Activation.SILU,
        "MLPs without a gate": not config.gated_mlp,
        "biases outside of qkv": config.out_bias or config.mlp_bias,
        "head dimensions that are not a multiple of 16 up to 256": config.head_dim % 16 != 0
        or config.head_dim > 256,
        "more than 64 query heads per KV head, or more than 256 KV heads": shared > 64
        or config.num_kv_heads > 256,
        f"layers wider than {_MAX_INPUTS}": widest > _MAX_INPUTS,
    }
    found = [what for what, holds in reasons.items() if holds]
    return f"the native runner does not support {found[0]}" if found else None


def _unsupported_options(options: RunnerOptions) -> str | None:
    if options.dtype not in ("auto", "int8", "int4"):
        return "dtype must be auto, int8 or int4 for the native runner"
    if options.kv_dtype not in _KV_DTYPES:
        return f"kv_dtype must be one of {', '.join(_KV_DTYPES)} for the native runner"
    if options.device not in ("auto", "cpu"):
        return "device must be auto or cpu for the native runner"
    if options.block_size % 16:
        return "block_size must be a multiple of 16 for the native runner"
    return None


def _wide_cache(config: ModelConfig, options: RunnerOptions) -> bool:
    """Whether K and V have 16 bits. By default 8, if a Hadamard transform can spread keys before
    they are rounded, and they have no bias, which would be most of what 8 bits hold.
    """
    if options.kv_dtype == "auto":
        return config.qkv_bias or not _can_spread(config)
    return options.kv_dtype == "bfloat16"


def _can_spread(config: ModelConfig) -> bool:
    """Whether the dimension of a head is a power of two."""
    return config.head_dim & (config.head_dim - 1) == 0


def _shape(config: ModelConfig, options: RunnerOptions, library: NativeLibrary) -> Shape:
    """Sizes of the network, with as many blocks as the memory holds."""
    threads = options.num_threads or min(usable_cpus(), MAX_THREADS)
    layers, wide = range(config.num_layers), _wide_cache(config, options)
    shape = Shape(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        dim=config.head_dim,
        width=config.intermediate_size,
        block_size=options.block_size,
        num_blocks=options.num_blocks or 1,
        max_rows=options.max_batch_tokens,
        hadamard=hadamard_block(config.intermediate_size),
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        wide_cache=wide,
        spreads=not wide and _can_spread(config),
        four_bit=options.dtype == "int4",
        threads=threads,
        compute_threads=min(threads, usable_cores()),
        compute_rows=COMPUTE_ROWS,
        norm_eps=config.norm_eps,
        windows=[config.window(layer) or NO_WINDOW for layer in layers],
        has_rotary=[layer not in config.rope_free_layers for layer in layers],
        cosines=np.zeros((0, config.head_dim // 2), np.float32),
        sines=np.zeros((0, config.head_dim // 2), np.float32),
    )
    num_blocks = options.num_blocks
    if num_blocks is None:
        size = library.block_bytes(shape)
        if options.kv_memory < size:
            raise ValueError(f"kv_memory must be at least {size} bytes, which is one block")
        num_blocks = options.kv_memory // size
    positions = min(config.max_model_len, num_blocks * options.block_size)
    cosines, sines = rotary_tables(config, positions)
    return replace(shape, num_blocks=num_blocks, cosines=cosines, sines=sines)
