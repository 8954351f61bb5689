"""Runners execute steps. A Protocol, and a table from name to loader.

A runner owns the weights and the KV pool and nothing else: which sequence holds which block is the
scheduler's bookkeeping. `run` is called from one thread, one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from model.adapters import Adapter
from model.batch import Batch, Bools, SamplingBatch, StepOutput
from model.compression import check_compression
from model.config import ModelConfig


class Runner(Protocol):
    """Executes steps over one set of weights and one KV pool."""

    config: ModelConfig
    block_size: int  # tokens per block
    num_blocks: int
    numeric_class: str  # answers of runners of one class are equal bit by bit or, if the kernels
    exact: bool  # cannot promise that (exact is False), within rounding

    def run(self, batch: Batch) -> StepOutput:
        """Computes the step and stores its K and V. Any exception means the runner is broken."""
        ...

    def warm_up(self) -> None:
        """Compiles, packs and touches what the first steps would otherwise wait for."""
        ...

    def close(self) -> None:
        """Frees memory and threads; the runner must not run again."""
        ...


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A step that was launched and not yet collected."""

    number: int


class OverlappedRunner(Runner, Protocol):
    """A runner that launches a step before the previous one is read.

        launch(N)   launch(N + 1)   collect(N)   launch(N + 2)   collect(N + 1) ...

    At most two steps are in flight; they are collected in the order they were launched. `run` is
    `collect(launch(batch))`, with nothing else in flight. A step that samples several rows of a
    sequence, to verify drafts, must be collected before the sequence's next step.
    """

    most_sampled: int  # rows of a step that may sample
    beside_host: bool  # whether a device computes, in order, what several runners launch

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        """Starts a step and returns at once.

        `unread_T` marks rows whose token the host has not read yet: the newest token sampled in
        the sequence's batch slot, by the step launched before. `tokens_T` is ignored there.
        Raises ValueError if such a row has penalties, a mask or a score: those depend on the
        unread token.
        """
        ...

    def collect(self, handle: StepHandle) -> StepOutput:
        """Waits for a step. Raises ValueError for any but the oldest step in flight."""
        ...


class DeferringRunner(OverlappedRunner, Protocol):
    """One that computes the layers of a step before it knows how the step samples.

        launch(N + 1, deferred)   collect(N)   sample(N + 1)   launch(N + 2, deferred) ...

    So penalties and masks that depend on the tokens of step N are made while the layers of step
    N + 1 are computed.
    """

    def launch(
        self, batch: Batch, *, unread_T: Bools | None = None, deferred: bool = False
    ) -> StepHandle:
        """As above. `deferred`: the sampling of `batch` is not read."""
        ...

    def sample(self, handle: StepHandle, sampling: SamplingBatch) -> None:
        """Samples the newest step. Raises ValueError if that was not deferred."""
        ...


def overlapped(runner: Runner) -> OverlappedRunner | None:
    """The runner, if it can launch steps ahead."""
    return cast("OverlappedRunner", runner) if getattr(runner, "launch", None) else None


def check_unread(batch: Batch, unread_T: Bools) -> None:
    """Raises ValueError if what a row with an unread token yields depends on that token, besides
    its logits.
    """
    sampling = batch.sampling
    rows = np.concatenate([sampling.penalty_rows_P, sampling.mask_rows_M])
    if unread_T[batch.sample_rows_R[rows]].any() or unread_T[batch.score_rows_Q].any():
        raise ValueError("a row whose token is unread has no penalties, masks or scores")


def deferring(runner: Runner) -> DeferringRunner | None:
    """The runner, if it can sample later than it launches."""
    return cast("DeferringRunner", runner) if getattr(runner, "sample", None) else None


def keeps_logits(runner: Runner) -> bool:
    """Whether its steps return the logits of open rows."""
    return getattr(runner, "keeps_logits", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """What a runner is built with."""

    dtype: str = "auto"  # auto | float32 | bfloat16 | int8 | int4 (native) | float8 (cuda)
    kv_dtype: str = "auto"  # auto: the runner's own | int8 (native) | float8 (cuda) | bfloat16
    kv_compression: str = "none"  # of `model.compression`; torch only
    device: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None  # None: as many as kv_memory holds
    kv_memory: int = 512 * 1024**2  # bytes for the KV pool
    memory_share: float | None = None  # cuda, instead: share of what weights and steps leave free
    num_threads: int | None = None  # None: as many as the machine has
    max_batch_tokens: int = 512  # the largest T of any step
    max_sequences: int = 64  # the largest S; batch slots are below it
    weights_cache: Path | None = None  # native: folder of packed weights; None: not stored
    adapters: tuple[Adapter, ...] = ()  # batches name them by their numbers, from 1
    vendor_blas: bool = False  # cuda: use it if it has our bits; the process forbids split-K


WHOLE_SUMS: Mapping[str, str] = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
"""Environment that leaves vendor BLAS no workspace for split-K, so that its sums may be exact."""

AnyWeights = Mapping[str, Any]
"""Canonical name -> tensor; for the native runner NumPy arrays too (see `model.weights`)."""

Loader = Callable[[ModelConfig, AnyWeights, RunnerOptions, str], Runner]
"""(config, weights, options, weights digest) -> runner. The digest goes into the numeric class."""


def _torch(config: ModelConfig, weights: AnyWeights, options: RunnerOptions, digest: str) -> Runner:
    from model.runners.torch import TorchRunner

    return TorchRunner(config, weights, options=options, digest=digest)


def _native(
    config: ModelConfig, weights: AnyWeights, options: RunnerOptions, digest: str
) -> Runner:
    from model.runners.native import NativeRunner

    check_compression(options.kv_compression, runner="native")
    return NativeRunner(config, weights, options=options, digest=digest)


def _cuda(config: ModelConfig, weights: AnyWeights, options: RunnerOptions, digest: str) -> Runner:
    from model.runners.torch import choose_device

    check_compression(options.kv_compression, runner="cuda")
    if choose_device(options.device).type != "cuda":
        raise ValueError("the cuda runner needs an NVIDIA GPU; none was found")
    from model.runners.cuda.build import build_runner

    return build_runner(config, weights, options=options, digest=digest)


RUNNERS: dict[str, Loader] = {"torch": _torch, "cuda": _cuda, "native": _native}
