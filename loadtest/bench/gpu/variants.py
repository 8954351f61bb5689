"""What runners launch, compiled for GPUs that are not there: nothing may spill.

    python -m loadtest.bench gpu-variants                  # of the three models, for three GPUs
    python -m loadtest.bench gpu-variants --arch 90 --model Qwen3-0.6B

A runner of the model's shape notes what its warm-up launches; each variant is compiled, and the
assembler must keep it in registers. Layers are alike: one stands for all.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver

from loadtest.bench.gpu.models import LLAMA31_8B, QWEN3_600M, SMOLLM2_135M
from model.config import ModelConfig
from model.kernels import shared_memory
from model.runners import RunnerOptions
from model.runners.cuda.build import build_runner
from model.runners.cuda.compile_ahead import TargetDriver, compiled, recorded
from model.transformer import Transformer

CHIPS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
KIB = {80: 163, 90: 227, 100: 227}  # of shared memory per program
MODELS = {
    "Qwen3-0.6B": QWEN3_600M,
    "SmolLM2-135M": SMOLLM2_135M,
    "Llama-3.1-8B": LLAMA31_8B,
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One variant: bytes of shared memory, and bytes spilled by a thread (stores and loads)."""

    kernel: str
    shared: int
    spilled: int


def launched(
    config: ModelConfig,
    arch: int,
    *,
    kv_dtype: str = "auto",
    max_sequences: int = 256,
    max_batch_tokens: int = 2048,
) -> dict[str, str]:
    """The variants that a runner of one layer launches at its start, by kernel and key."""
    _aim_at(arch)
    config = replace(config, num_layers=1)
    with torch.device("meta"):
        tensors = Transformer(config).state_dict()
    weights = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in tensors.items()}
    options = RunnerOptions(
        dtype="bfloat16",
        kv_dtype=kv_dtype,
        device="cpu",
        num_blocks=64,
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
    )

    def start() -> None:
        build_runner(config, weights, options=options, digest="none", check=None).warm_up()

    allocate, allocate_like = torch.empty, torch.empty_like
    # Nothing is computed, and token 0 is a token.
    torch.empty = lambda *args, **kwargs: allocate(*args, **kwargs).zero_()
    torch.empty_like = lambda *args, **kwargs: allocate_like(*args, **kwargs).zero_()
    try:
        return recorded(start)
    finally:
        torch.empty, torch.empty_like = allocate, allocate_like


def compile_all(variants: dict[str, str], arch: int, *, processes: int) -> Iterator[Compiled]:
    """Compiles variants in processes, or in this one if `processes` is 1."""
    work = [(name, variant, arch) for name, variant in sorted(variants.items())]
    if processes == 1:
        yield from map(_compile, work)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile, work)


def _compile(work: tuple[str, str, int]) -> Compiled:
    name, variant, arch = work
    _aim_at(arch)
    done = compiled(variant)
    kernel = name.split(" ")[0].split(".")[-1]
    return Compiled(kernel, done.metadata.shared, spilled(done.asm["ptx"], arch))


def _aim_at(arch: int) -> None:
    shared_memory.HOPPER = KIB[arch] * 1024
    shared_memory.shared_memory.cache_clear()
    driver.set_active(TargetDriver(GPUTarget("cuda", arch, 32)))


def spilled(assembly: str, arch: int) -> int:
    """Bytes that the assembler moves out of registers."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(assembly)
        source.flush()
        chip = f"--gpu-name={CHIPS[arch]}"
        command = [get_ptxas(arch).path, "-v", chip, source.name, "-o", os.devnull]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", report)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, nargs="+", choices=CHIPS, default=[*CHIPS])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))


def run(options: argparse.Namespace) -> None:
    """Prints a table; exits with 1 if a variant spills."""
    bad = 0
    print(f"Triton {triton.__version__}\n\n| model | GPU | variants | spilled |\n|---|---|---|---|")
    for model in options.model:
        for arch in options.arch:
            variants = launched(MODELS[model], arch)
            found = list(compile_all(variants, arch, processes=options.processes))
            spills = {each.kernel: each.spilled for each in found if each.spilled}
            bad += len(spills)
            print(f"| {model} | sm_{arch} | {len(found)} | {spills or 'nothing'} |", flush=True)
    if bad:
        raise SystemExit(1)
