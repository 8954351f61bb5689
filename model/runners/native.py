"""NativeRunner: a step in one call of a C++ library, 8-bit weights and activations, on a CPU.

Bits of an answer do not depend on the batch, the chunks, the blocks, the threads or the variant of
instructions: see src/kernels.h. Families with other norms or activations than Llama's are not
served; `unsupported` says why. Sampling with anything but the likeliest token is the sampler's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.batch import Batch, Floats, Ints, SamplingBatch, StepOutput
from model.config import Activation, ModelConfig, Norm, Position
from model.native.library import (
    EVERYTHING,
    NativeLibrary,
    NativeModel,
    Shape,
    usable_cores,
    usable_cpus,
)
from model.native.quantize import hadamard_block, load, rotary_tables
from model.runners import RunnerOptions, Weights
from model.sampler import ScoredRows, sample, score

KERNEL_VERSION = 1  # rises whenever the bits of a result change: a test holds it to that
SCORED_AT_ONCE = 64  # rows whose logits over the whole vocabulary are in memory together
MOST_THREADS = 16  # more of them wait for one another longer than they compute
COMPUTE_ROWS = 32  # from here on a step waits for multipliers, not for memory
_WIDEST = 65_536  # inputs of a product: its sums must fit 32 bits

_KV_NAMES = {"auto": "", "bfloat16": "", "int8": "-kv8"}


class NativeRunner:
    """Owns the packed weights, the KV pool and the threads of the native step.

    Raises ValueError for a model or options it cannot serve, NativeUnavailable where the library
    cannot be built or run. `variant` forces an instruction set; by default the best one is used.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, *, options: RunnerOptions, digest: str,
        variant: str = "", library: NativeLibrary | None = None,
    ) -> None:  # fmt: skip
        reason = unsupported(config) or _unsupported_options(options)
        if reason:
            raise ValueError(reason)
        library = library or NativeLibrary()
        shape = _shape(config, options, library)
        self.config = config
        self.block_size = options.block_size
        self.num_blocks = shape.num_blocks
        kind = f"native-int8{_KV_NAMES[options.kv_dtype]}"
        self.numeric_class = f"{kind}-v{KERNEL_VERSION}-{digest[:12]}"
        self.exact = True
        self._model = NativeModel(library, shape, variant=variant)
        load(self._model, config, weights)
        self._logits = np.empty((0, config.vocab_size), np.float32)
        # The sampler's few operations are not worth waking threads that then spin beside ours.
        torch.set_num_threads(1)

    @property
    def variant(self) -> str:
        """The instruction set that computes."""
        return self._model.variant

    def run(self, batch: Batch) -> StepOutput:
        """Computes the step and stores its K and V."""
        rows = _rows_with_logits(batch.sampling)
        logits_LV = self._room(len(rows))
        places: dict[int, Floats] = dict(zip(rows.tolist(), logits_LV, strict=True))
        tokens_R = self._model.step(
            tokens_T=batch.tokens_T,
            positions_T=batch.positions_T,
            query_starts_S1=batch.query_starts_S1,
            block_table_SB=batch.block_table_SB,
            output_rows_R=batch.sample_rows_R,
            logits=places,
            keeps_rows=len(batch.score_rows_Q) > 0,
        )
        sampled = _choose(tokens_R, rows, logits_LV, batch.sampling)
        scored = self._score(batch)
        return StepOutput(
            tokens_R=tokens_R,
            logprobs_R=sampled.logprobs,
            top_ids_RN=sampled.top_ids,
            top_logprobs_RN=sampled.top_logprobs,
            score_logprobs_Q=scored.logprobs,
            score_top_ids_QN=scored.top_ids,
            score_top_logprobs_QN=scored.top_logprobs,
        )

    def warm_up(self) -> None:
        """Touches weights, threads and arena with a decoded token and the largest chunk."""
        room = min(self.num_blocks * self.block_size, self._model.shape.max_rows)
        for length in {1, min(room, len(self._model.shape.cosines))}:
            self._model.step(
                tokens_T=np.zeros(length, np.int32),
                positions_T=np.arange(length, dtype=np.int32),
                query_starts_S1=np.array([0, length], np.int32),
                block_table_SB=np.arange(self.num_blocks, dtype=np.int32)[None],
                output_rows_R=np.array([length - 1], np.int32),
                logits={},
            )

    def close(self) -> None:
        """Ends the threads and gives the memory back; the runner must not run again."""
        self._model.close()

    def _room(self, rows: int) -> Floats:
        """Memory for the logits of some rows, kept from step to step."""
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self.config.vocab_size), np.float32)
        return self._logits[:rows]

    def _score(self, batch: Batch) -> _Logprobs:
        """Log probabilities of given tokens, piece by piece."""
        pieces: list[ScoredRows] = []
        for start in range(0, len(batch.score_rows_Q), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            logits_QV = self._head(batch.score_rows_Q[part])
            ids_Q = torch.from_numpy(batch.score_ids_Q[part])
            pieces.append(score(logits_QV, ids_Q, num_top=batch.score_num_top))
        if not pieces:  # most steps: no operation of torch for nothing
            return _NO_LOGPROBS
        return _Logprobs(
            torch.cat([piece.logprobs_Q for piece in pieces]).numpy(),
            torch.cat([piece.top_ids_QN for piece in pieces]).int().numpy(),
            torch.cat([piece.top_logprobs_QN for piece in pieces]).numpy(),
        )

    def _head(self, rows_Q: Ints) -> torch.Tensor:
        """Logits of some rows of the step that was just run."""
        logits_QV = self._room(len(rows_Q))
        nothing = np.zeros(0, np.int32)
        self._model.step(
            tokens_T=nothing,
            positions_T=nothing,
            query_starts_S1=np.zeros(1, np.int32),
            block_table_SB=np.zeros((0, 0), np.int32),
            output_rows_R=rows_Q,
            logits=dict(enumerate(logits_QV)),
        )
        return torch.from_numpy(logits_QV)


def unsupported(config: ModelConfig) -> str | None:
    """Why the native step cannot run a model, or None where it can."""
    shared = config.num_heads // config.num_kv_heads
    widest = max(config.hidden_size, config.intermediate_size, config.query_size)
    reasons = {
        "norms other than RMSNorm": config.norm is not Norm.RMS,
        "learned positions": config.position is not Position.ROTARY,
        "activations other than SiLU": config.activation is not Activation.SILU,
        "MLPs without a gate": not config.gated_mlp,
        "biases outside of qkv": config.out_bias or config.mlp_bias,
        "heads that are no multiple of 16 wide, up to 256": config.head_dim % 16 != 0
        or config.head_dim > 256,
        "more than 64 query heads a KV head, or more than 256 KV heads": shared > 64
        or config.num_kv_heads > 256,
        f"layers wider than {_WIDEST}": widest > _WIDEST,
    }
    found = [what for what, holds in reasons.items() if holds]
    return f"the native runner does not do {found[0]}" if found else None


def _unsupported_options(options: RunnerOptions) -> str | None:
    if options.dtype not in ("auto", "int8"):
        return "dtype must be auto or int8 for the native runner"
    if options.kv_dtype not in _KV_NAMES:
        return f"kv_dtype must be one of {', '.join(_KV_NAMES)} for the native runner"
    if options.device not in ("auto", "cpu"):
        return "device must be auto or cpu for the native runner"
    if options.block_size % 16:
        return "block_size must be a multiple of 16 for the native runner"
    return None


def _shape(config: ModelConfig, options: RunnerOptions, library: NativeLibrary) -> Shape:
    """Sizes of the network, and as many blocks as the memory holds."""
    threads = options.num_threads or min(usable_cpus(), MOST_THREADS)
    layers = range(config.num_layers)
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
        wide_cache=options.kv_dtype != "int8",
        threads=threads,
        compute_threads=min(threads, usable_cores()),
        compute_rows=COMPUTE_ROWS,
        norm_eps=config.norm_eps,
        windows=[config.window(layer) or EVERYTHING for layer in layers],
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


class _Logprobs(NamedTuple):
    """Of a given or chosen token a row, and of the likeliest ones; no rows where none are asked."""

    logprobs: Floats
    top_ids: Ints
    top_logprobs: Floats


_NO_LOGPROBS = _Logprobs(
    np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32)
)


def _choose(
    tokens_R: Ints, rows: npt.NDArray[np.intp], logits_LV: Floats, sampling: SamplingBatch
) -> _Logprobs:
    """Lets the sampler choose the tokens of `rows`, and writes them into `tokens_R`."""
    if not rows.size:
        return _NO_LOGPROBS
    part = sample(torch.from_numpy(logits_LV), _some(sampling, rows))
    tokens_R[rows] = part.tokens_R.numpy()
    if not part.logprobs_R.numel():
        return _NO_LOGPROBS
    return _Logprobs(
        _spread(part.logprobs_R.numpy(), rows, len(tokens_R)),
        _spread(part.top_ids_RN.int().numpy(), rows, len(tokens_R)),
        _spread(part.top_logprobs_RN.numpy(), rows, len(tokens_R)),
    )


def _rows_with_logits(sampling: SamplingBatch) -> npt.NDArray[np.intp]:
    """Rows that want more than the likeliest token."""
    needs_R: npt.NDArray[np.bool_] = (sampling.temperatures_R != 0) | sampling.wants_logprobs_R
    for rows in (sampling.penalty_rows_P, sampling.bias_rows_E, sampling.mask_rows_M):
        if rows.size:
            needs_R[rows] = True
    return needs_R.nonzero()[0]


def _some(sampling: SamplingBatch, rows: npt.NDArray[np.intp]) -> SamplingBatch:
    """The sampling of some rows, which hold all penalties, biases and masks."""
    places = np.zeros(len(sampling.seeds_R), np.int32)
    places[rows] = np.arange(len(rows), dtype=np.int32)
    columns = (
        "seeds_R", "choices_R", "indices_R", "temperatures_R", "top_ks_R", "top_ps_R", "min_ps_R",
        "presence_R", "frequency_R", "repetition_R", "wants_logprobs_R",
    )  # fmt: skip
    return replace(
        sampling,
        **{name: getattr(sampling, name)[rows] for name in columns},
        penalty_rows_P=places[sampling.penalty_rows_P],
        bias_rows_E=places[sampling.bias_rows_E],
        mask_rows_M=places[sampling.mask_rows_M],
    )


def _spread(part: npt.NDArray[Any], rows: npt.NDArray[np.intp], count: int) -> npt.NDArray[Any]:
    """Puts rows back into their places among `count`; the others are 0."""
    whole = np.zeros((count, *part.shape[1:]), part.dtype)
    whole[rows] = part
    return whole
