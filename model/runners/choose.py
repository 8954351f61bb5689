"""Selects the fastest runner that machine, model and dtype allow, and fills in default sizes.

It also reports why a faster runner cannot serve: operators that expect 2,000 tokens per
second and get 400 must not have to guess.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

from model.compression import (
    NO_COMPRESSION,
    check_compression,
    compressed_config,
    parse_compression,
)
from model.config import ModelConfig
from model.runners import RunnerOptions

_NVIDIA_DRIVER = "libcuda.so.1"
_UNKNOWN = "the checkpoint is not known"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedRunner:
    """A name of `RUNNERS`."""

    name: str
    dtype: str | None  # torch's, that the weights are read in; None: as stored
    keeps_blocks: bool = False  # whether the layers are read in the file's own blocks
    fallback_reason: str = ""  # why a faster runner cannot serve; empty if there is none


def choose_runner(
    name: str,
    config: ModelConfig,
    options: RunnerOptions,
    *,
    num_ranks: int = 1,
    is_alone: bool = False,
    four_bit_reason: str | None = _UNKNOWN,
    eight_bit_reason: str | None = _UNKNOWN,
) -> SelectedRunner:
    """The named runner, or for `auto` the fastest that can run the model.

    `is_alone`: no engine on another machine continues its answers, so weights may be of the type
    that is fastest on this one. `four_bit_reason`: why the layers cannot be read in 4 bits, or None
    if they can, and likewise `eight_bit_reason` (cuda runner; the native one makes its own 8 bits
    of any file). Raises ValueError if the device is not available or the dtype is unknown or
    impossible. Imports torch only if it, or a GPU, may be used.
    """
    if config.bidirectional:
        raise ValueError(f"{config.family} is an encoder, which generates no text")
    if config.encoder is not None:
        return _choose_for_sources(name, config, options, num_ranks=num_ranks)
    check_compression(options.kv_compression, runner=name, num_ranks=num_ranks)
    compression = parse_compression(options.kv_compression)
    compressed_config(config, compression)
    is_four_bit = options.dtype == "int4"
    if is_four_bit or _packs_on_gpu(name, options):
        choose = _choose_four_bit if is_four_bit else _choose_packed
        unreadable = four_bit_reason if is_four_bit else eight_bit_reason
        return choose(name, config, options, unreadable, num_ranks=num_ranks)
    may_keep = is_alone and four_bit_reason is None and options.dtype == "auto"
    dtypes = {"native": None, "cuda": "bfloat16"}
    if name in dtypes:
        return _fastest(name, dtypes[name], may_keep=may_keep)
    if name == "torch" or compression or options.dtype in {"float32", "bfloat16"}:
        return SelectedRunner(name="torch", dtype=torch_dtype(options))
    device = device_type(options.device)
    faster = "native" if device == "cpu" else "cuda"
    reason: str | None = None
    if faster == "cuda":
        reason = _cuda_reason(config, options.device, device)
    elif num_ranks == 1:
        reason = _native_reason(config)
    else:
        reason = "it does not support tensor parallelism"
    if reason is None:
        return _fastest(faster, dtypes[faster], may_keep=may_keep)
    dtype = torch_dtype(options)
    return SelectedRunner(name="torch", dtype=dtype, fallback_reason=f"{faster}: {reason}")


def _fastest(name: str, dtype: str | None, *, may_keep: bool) -> SelectedRunner:
    """The runner with the weights that it computes with fastest: if they may be kept, the file's 4
    bits on a CPU that multiplies these faster at any load.
    """
    if name != "native" or not may_keep:
        return SelectedRunner(name=name, dtype=dtype)
    from model.native import NativeUnavailable
    from model.native.library import NativeLibrary
    from model.runners.native import FOUR_BIT_VARIANTS

    try:
        keeps_blocks = NativeLibrary().variants[0] in FOUR_BIT_VARIANTS
    except NativeUnavailable:  # building the named runner will say why
        keeps_blocks = False
    return SelectedRunner(name=name, dtype=dtype, keeps_blocks=keeps_blocks)


def _choose_for_sources(
    name: str, config: ModelConfig, options: RunnerOptions, *, num_ranks: int
) -> SelectedRunner:
    """The torch runner, or ValueError: no other one serves encoder-decoders."""
    others = num_ranks > 1 or options.adapters or options.kv_compression != "none"
    if name not in ("auto", "torch") or others:
        raise ValueError(
            f"{config.family} is an encoder-decoder, which only the torch runner serves, without"
            " tensor parallelism, adapters and kv_compression"
        )
    return SelectedRunner(name="torch", dtype=torch_dtype(options))


def _packs_on_gpu(name: str, options: RunnerOptions) -> bool:
    """Whether the dtype is one of weights of 8 bits, and int8 is that of a GPU."""
    if options.dtype == "int8":
        on_gpu = name == "auto" and device_type(options.device) == "cuda"
        return on_gpu or name == "cuda"
    return options.dtype == "float8"


def _choose_packed(
    name: str,
    config: ModelConfig,
    options: RunnerOptions,
    eight_bit_reason: str | None,
    *,
    num_ranks: int,
) -> SelectedRunner:
    """The cuda runner, or ValueError: no other one has such weights."""
    dtype = options.dtype
    _refuse_compression(options)
    if name not in ("auto", "cuda"):
        raise ValueError(f"dtype {dtype} needs the cuda runner, not {name}")
    if dtype == "int8" and num_ranks > 1:
        raise ValueError("dtype int8 does not support tensor parallelism on GPUs: use float8")
    reason = eight_bit_reason if dtype == "int8" else None
    reason = reason or _cuda_reason(config, options.device, device_type(options.device))
    if reason is not None:
        raise ValueError(f"dtype {dtype} is not possible: {reason}; use --dtype auto")
    return SelectedRunner(name="cuda", dtype="bfloat16", keeps_blocks=dtype == "int8")


def _choose_four_bit(
    name: str, config: ModelConfig, options: RunnerOptions, reason: str | None, *, num_ranks: int
) -> SelectedRunner:
    """The native runner, or ValueError: no other one has 4 bits."""
    _refuse_compression(options)
    if name not in ("auto", "native"):
        raise ValueError(f"dtype int4 needs the native runner, not {name}")
    if num_ranks > 1:
        raise ValueError("dtype int4 does not support tensor parallelism")
    reason = reason or _native_reason(config)
    if reason is not None:
        raise ValueError(f"dtype int4 is not possible: {reason}; use --dtype int8 or auto")
    return SelectedRunner(name="native", dtype=None, keeps_blocks=True)


def _refuse_compression(options: RunnerOptions) -> None:
    if options.kv_compression != NO_COMPRESSION:
        raise ValueError(
            f"kv_compression needs the torch runner, which has no dtype {options.dtype}"
        )


def device_type(name: str) -> str:
    """The type of the device that torch would choose; without torch, if that can be no GPU.

    Raises ValueError if the device is not available.
    """
    if name == "cpu" or (name == "auto" and not _has_nvidia_driver()):
        return "cpu"
    from model.runners.torch import choose_device

    return choose_device(name).type


def torch_dtype(options: RunnerOptions) -> str:
    """The name of the dtype that the torch runner computes in. Raises ValueError."""
    from model.runners.torch import choose_device, choose_dtype

    dtype = choose_dtype(options.dtype, choose_device(options.device))
    return str(dtype).removeprefix("torch.")


def _has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL(_NVIDIA_DRIVER)
    except OSError:
        return False
    return True


def choose_sizes(
    options: RunnerOptions,
    *,
    runner: str,
    kv_memory: int | None,
    memory_share: float,
    max_batch_tokens: int | None,
    max_sequences: int | None,
) -> RunnerOptions:
    """The options with sizes: the operator's, or defaults that fit the runner for None.

    On a GPU the pool takes its share of the memory, and steps are large; a CPU and its memory are
    shared with other processes. Raises ValueError for sizes that contradict one another.
    """
    on_gpu = runner == "cuda"
    tokens, sequences = (2048, 256) if on_gpu else (512, 64)
    if max_batch_tokens is None:
        max_batch_tokens = max(tokens, max_sequences or 0)
    if max_sequences is None:
        max_sequences = min(sequences, max_batch_tokens)
    if max_sequences > max_batch_tokens:
        raise ValueError(
            f"max_sequences is {max_sequences} and must be at most max_batch_tokens, "
            f"{max_batch_tokens}: a step has at least one token per sequence"
        )
    return replace(
        options,
        kv_memory=options.kv_memory if kv_memory is None else kv_memory,
        memory_share=memory_share if on_gpu and kv_memory is None else None,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )


def _cuda_reason(config: ModelConfig, name: str, device: str) -> str | None:
    """Why the cuda runner cannot run a model on a device; None: it can."""
    if device != "cuda":
        return f"it needs an NVIDIA GPU, and the device is {device}"
    try:
        from model.runners.cuda.chip import unsupported_chip
        from model.runners.cuda.network import unsupported
    except ImportError as error:
        return f"the package {error.name} is not installed"
    from model.runners.torch import choose_device

    return unsupported(config) or unsupported_chip(choose_device(name))


def _native_reason(config: ModelConfig) -> str | None:
    """Why the native runner cannot run a model on this machine; None: it can, and is built."""
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
