"""Chooses what was not said: the fastest runner that machine, model and dtype allow, and its sizes.

It also says why a faster one was passed over: an operator who waits for 2,000 tokens a second and
gets 400 must not have to guess.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from model.config import ModelConfig
from model.runners import RunnerOptions
from model.runners.torch import choose_device, choose_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`dtype` is what the weights are read in; None: as stored. `passed_over` is for the banner."""

    name: str
    dtype: torch.dtype | None
    passed_over: str = ""


def choose_runner(
    name: str, config: ModelConfig, options: RunnerOptions, *, num_ranks: int = 1
) -> Choice:
    """The runner to build: the named one, or for `auto` the fastest that can run the model.

    Raises ValueError if the device is not available or the dtype is unknown.
    """
    dtypes = {"native": None, "cuda": torch.bfloat16}
    if name in dtypes:
        return Choice(name=name, dtype=dtypes[name])
    device = choose_device(options.device)
    fallback = choose_dtype(options.dtype, device)
    if name == "torch" or options.dtype in {"float32", "bfloat16"}:
        return Choice(name="torch", dtype=fallback)
    faster = "native" if device.type == "cpu" else "cuda"
    if faster == "cuda":
        reason = _cuda_reason(config, device)
    elif num_ranks == 1:
        reason = _native_reason(config)
    else:
        reason = "it does no tensor parallelism"
    if reason is None:
        return Choice(name=faster, dtype=dtypes[faster])
    return Choice(name="torch", dtype=fallback, passed_over=f"{faster}: {reason}")


def choose_sizes(
    options: RunnerOptions,
    *,
    runner: str,
    kv_memory: int | None,
    memory_share: float,
    max_batch_tokens: int | None,
    max_sequences: int | None,
) -> RunnerOptions:
    """The options with sizes: the operator's, and where None was given those that fit the runner.

    A GPU is a machine of its own: the pool takes its share of the memory, steps are large. A CPU is
    the home of others. Raises ValueError for sizes that contradict one another.
    """
    on_gpu = runner == "cuda"
    tokens, sequences = (2048, 256) if on_gpu else (512, 64)
    if max_batch_tokens is None:
        max_batch_tokens = max(tokens, max_sequences or 0)
    if max_sequences is None:
        max_sequences = min(sequences, max_batch_tokens)
    if max_sequences > max_batch_tokens:
        raise ValueError(
            f"max_sequences is {max_sequences} and must not be above max_batch_tokens, "
            f"{max_batch_tokens}: a step has a token of each"
        )
    return replace(
        options,
        kv_memory=options.kv_memory if kv_memory is None else kv_memory,
        memory_share=memory_share if on_gpu and kv_memory is None else None,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )


def _cuda_reason(config: ModelConfig, device: torch.device) -> str | None:
    """Why the cuda runner cannot run a model here."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the device is {device.type}"
    try:
        from model.runners.cuda.network import unsupported
    except ImportError as error:
        return f"the package {error.name} is not installed"
    return unsupported(config)


def _native_reason(config: ModelConfig) -> str | None:
    """Why the native runner cannot serve here; builds its library where it can."""
    from model.native import NativeUnavailable
    from model.native.library import NativeLibrary
    from model.runners.native import unsupported

    reason = unsupported(config)
    if reason is not None:
        return reason
    try:
        NativeLibrary()
    except NativeUnavailable as error:
        return str(error)
    return None
