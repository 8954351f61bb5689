"""Runners: what executes a step. A Protocol, and a table from name to loader.

A runner owns the weights and the KV pool and nothing else: which sequence holds which block is the
service's bookkeeping. `run` is called from one thread, one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from model.batch import Batch, Bools, StepOutput
from model.config import ModelConfig

if TYPE_CHECKING:
    import torch


class Runner(Protocol):
    """Executes steps over one set of weights and one KV pool."""

    config: ModelConfig
    block_size: int  # tokens a block
    num_blocks: int
    numeric_class: str  # answers of runners with equal classes are equal bit by bit, or, where the
    exact: bool  # kernels cannot promise that (False), within rounding

    def run(self, batch: Batch) -> StepOutput:
        """Computes the step and stores its K and V. Any exception means the runner is broken."""
        ...

    def warm_up(self) -> None:
        """Compiles, packs and touches what the first real steps would otherwise wait for."""
        ...

    def close(self) -> None:
        """Gives memory and threads back."""
        ...


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A step that was launched and not yet collected."""

    number: int


class OverlappedRunner(Runner, Protocol):
    """A runner whose steps can be launched before the one before is read.

        launch(N)   launch(N + 1)   collect(N)   launch(N + 2)   collect(N + 1) ...

    At most two steps are under way; they are collected in the order they were launched. `run` is
    `collect(launch(batch))`, with nothing else under way.
    """

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        """Starts a step and returns at once.

        `unread_T` marks rows whose token the host has not read yet: the newest one that the
        sequence on that seat sampled, in a step already launched. What stands in `tokens_T` there
        is ignored. Raises ValueError where such a row has penalties, a mask or is scored: those
        are functions of the unread token.
        """
        ...

    def collect(self, handle: StepHandle) -> StepOutput:
        """Waits for a step. Raises ValueError for any but the oldest one under way."""
        ...


def overlapped(runner: Runner) -> OverlappedRunner | None:
    """The runner, where its steps can be launched ahead."""
    return cast("OverlappedRunner", runner) if hasattr(runner, "launch") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """What a runner is built with."""

    dtype: str = "auto"  # auto | float32 | bfloat16 (| int8 where a runner has it)
    kv_dtype: str = "auto"  # auto: the runner's own | int8 (native) | float8 (cuda) | bfloat16
    device: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None  # None: as many as kv_memory holds
    kv_memory: int = 512 * 1024**2  # bytes for the KV pool
    memory_share: float | None = None  # cuda: instead, of what weights and steps leave free
    num_threads: int | None = None  # None: what the machine has
    max_batch_tokens: int = 512  # the largest T of any step
    max_sequences: int = 64  # the largest S; seats are below it
    library_products: bool = False  # cuda: where it has our bits; the process keeps sums whole


Weights = Mapping[str, "torch.Tensor"]
"""Canonical name (see `model.families`) -> tensor, fused, on the host, dtype as stored."""

Loader = Callable[[ModelConfig, Weights, RunnerOptions, str], Runner]
"""(config, weights, options, weights digest) -> runner. The digest goes into the numeric class."""


def _torch(config: ModelConfig, weights: Weights, options: RunnerOptions, digest: str) -> Runner:
    from model.runners.torch import TorchRunner

    return TorchRunner(config, weights, options=options, digest=digest)


def _native(config: ModelConfig, weights: Weights, options: RunnerOptions, digest: str) -> Runner:
    from model.runners.native import NativeRunner

    return NativeRunner(config, weights, options=options, digest=digest)


def _cuda(config: ModelConfig, weights: Weights, options: RunnerOptions, digest: str) -> Runner:
    from model.runners.torch import choose_device

    if choose_device(options.device).type != "cuda":
        raise ValueError("the cuda runner needs an NVIDIA GPU; there is none here")
    from model.runners.cuda.runner import CudaRunner

    return CudaRunner(config, weights, options=options, digest=digest)


RUNNERS: dict[str, Loader] = {"torch": _torch, "cuda": _cuda, "native": _native}
