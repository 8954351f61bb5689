"""Compiles the variants of the kernels that some work launches, in parallel, to Triton's cache.

    recorded       runs the work; launches are suppressed, and what they would compile is noted
    compile_ahead  the same, then compiles the variants in processes: the work finds them cached
    main           such a process: `python -m model.runners.cuda.compile_ahead`, variants on stdin

Compiling releases no lock for long enough to gain from threads. A process needs no GPU.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_MOST_PROCESSES = 16
_FEW = 4  # variants that are compiled no faster by processes, which take seconds to start
_ROOT = Path(__file__).resolve().parents[3]


class TargetDriver:
    """In place of Triton's driver: a GPU to compile for that need not be there."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def recorded(work: Callable[[], object]) -> dict[str, str]:
    """Runs `work`; none of the kernels that it launches in this thread runs.

    Returns the variants that it would compile: module and specialisation, by kernel and key.
    """
    found: dict[str, str] = {}
    thread = threading.get_ident()
    run, hook = JITFunction.run, knobs.runtime.jit_cache_hook

    def note(*, key: Any, fn: Any, compile: Any, **_: Any) -> bool:  # noqa: A002, ANN401 - Triton's
        if threading.get_ident() != thread:
            return False
        data = compile["specialization_data"]
        found[f"{fn.module}.{fn.name} {key}"] = json.dumps([fn.module, fn.name, data])
        return True  # not compiled

    def keep_back(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ANN401
        # A kernel that is compiled already would read indices that no other one has written.
        return run(self, *args, warmup=warmup or threading.get_ident() == thread, **kwargs)

    knobs.runtime.jit_cache_hook, JITFunction.run = note, keep_back
    try:
        work()
    finally:
        knobs.runtime.jit_cache_hook, JITFunction.run = hook, run
    return found


def compile_ahead(work: Callable[[], object], *, processes: int | None = None) -> int:
    """Returns the number of variants that it compiled: 0 if the same were compiled before.

    A variant that does not compile is left to the work itself, which raises the error.
    """
    variants = sorted(recorded(work).values())
    target = driver.active.get_current_target()
    stamp = _stamp(variants, target)
    if len(variants) < _FEW or stamp.exists():
        return 0
    count = min(processes or len(os.sched_getaffinity(0)), _MOST_PROCESSES, len(variants))
    shares = [variants[index::count] for index in range(count)]
    running = [_start() for _ in shares]
    for process, share in zip(running, shares, strict=True):
        order = {"target": [target.backend, target.arch, target.warp_size], "variants": share}
        if process.stdin is not None:
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
    statuses = [process.wait() for process in running]
    if not any(statuses):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    return len(variants)


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "model.runners.cuda.compile_ahead"]
    return subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE)  # noqa: S603 - this program


def _stamp(variants: list[str], target: GPUTarget) -> Path:
    """A file in Triton's cache that exists if all these were compiled there."""
    kernels = {name: source_hash(name) for name in variants}
    text = json.dumps([triton.__version__, str(target), kernels], sort_keys=True)
    return Path(knobs.cache.dir) / f"quire-{hashlib.sha256(text.encode()).hexdigest()}"


def compiled(variant: str) -> Any:  # noqa: ANN401 - Triton's kernel
    """Compiles one of what `recorded` returned, for the target of Triton's driver."""
    module, name, data = json.loads(variant)
    return _kernel(module, name).preload(data)


def source_hash(variant: str) -> str:
    """Of the kernel's source and all that it calls."""
    key: str = _kernel(*json.loads(variant)[:2]).cache_key
    return key


def _kernel(module: str, name: str) -> JITFunction[Any]:
    kernel: JITFunction[Any] = getattr(importlib.import_module(module), name)
    return kernel


def main() -> None:
    order = json.load(sys.stdin)
    driver.set_active(TargetDriver(GPUTarget(*order["target"])))
    for variant in order["variants"]:
        compiled(variant)


if __name__ == "__main__":
    main()
