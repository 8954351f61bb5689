"""Chooses the runner where none was named: the fastest that this machine, model and dtype allow.

It also says why a faster one was passed over: an operator who waits for 2,000 tokens a second and
gets 400 must not have to guess.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def choose_runner(name: str, config: ModelConfig, options: RunnerOptions) -> Choice:
    """The runner to build. `auto` never raises; a name is taken at its word."""
    if name == "native":
        return Choice(name="native", dtype=None)
    if name == "cuda":
        return Choice(name="cuda", dtype=torch.bfloat16)
    fallback = choose_dtype(options.dtype, choose_device(options.device))
    if name == "torch" or options.dtype in {"float32", "bfloat16"}:
        return Choice(name="torch", dtype=fallback)
    if choose_device(options.device).type != "cpu":
        return Choice(name="cuda", dtype=torch.bfloat16)
    reason = _native_reason(config)
    if reason is None:
        return Choice(name="native", dtype=None)
    return Choice(name="torch", dtype=fallback, passed_over=f"native: {reason}")


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
