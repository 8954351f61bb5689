"""What runners launch, compiled for GPUs that are not there: nothing may spill.

    python -m loadtest.bench gpu-variants                  # of the three models, for three GPUs
    python -m loadtest.bench gpu-variants --arch 90 --model Qwen3-0.6B

A runner of the model's shape, with an adapter of all its matrices, notes what its warm-up launches;
each variant is compiled, and the
assembler must keep it in registers. Layers are alike: one stands for all. What several models or
runs have in common is compiled once: results are kept in Triton's cache, by the source of the
kernel and what it is compiled for, so that a run that was stopped goes on where it was. Of variants
that differ in the alignment of pointers alone, the one with most aligned pointers is compiled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from loadtest.bench.gpu.models import LLAMA31_8B, QWEN3_600M, SMOLLM2_135M
from model.adapters import Adapter, Factors
from model.config import ModelConfig
from model.kernels import shared_memory
from model.packed_weights import is_matrix
from model.runners import RunnerOptions
from model.runners.cuda.build import build_runner
from model.runners.cuda.compile_ahead import TargetDriver, compiled, recorded, source_hash
from model.transformer import Transformer

KIB = {80: 163, 90: 227, 100: 227}  # of shared memory per program, by GPU
MODELS = {
    "Qwen3-0.6B": QWEN3_600M,
    "SmolLM2-135M": SMOLLM2_135M,
    "Llama-3.1-8B": LLAMA31_8B,
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One variant: bytes of shared memory, and of a thread registers and bytes spilled."""

    kernel: str
    shared: int
    registers: int
    spilled: int  # stores and loads


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
        adapters=(_adapter_of(weights),),
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


def _adapter_of(weights: Mapping[str, torch.Tensor]) -> Adapter:
    """An adapter of all matrices of the layers, of the usual rank."""
    factors = {
        name: Factors(np.zeros((16, weight.shape[1]), "f"), np.zeros((len(weight), 16), "f"))
        for name, weight in weights.items()
        if is_matrix(name)
    }
    return Adapter(digest="none", factors=factors)


def distinct(variants: Iterable[str]) -> list[str]:
    """One of each group of variants that differ in the alignment of pointers alone."""
    groups: dict[str, str] = {}
    for variant in sorted(variants, key=lambda text: text.count("tt.divisibility")):
        module, name, data = json.loads(variant)
        found = json.loads(data)
        pointers = [
            index for index, kind in enumerate(found["signature"].values()) if kind[0] == "*"
        ]
        kept = [
            (key, value)
            for key, value in zip(found["attrs_keys"], found["attrs_vals"], strict=True)
            if key[0] not in pointers
        ]
        about = {key: value for key, value in found.items() if not key.startswith("attrs")}
        about.pop("key", None)
        groups[json.dumps([module, name, about, kept], sort_keys=True)] = variant
    return sorted(groups.values())


def compile_all(variants: Iterable[str], arch: int, *, processes: int) -> Iterator[Compiled]:
    """Compiles what was not compiled before, in processes, or in this one if that is 1."""
    work = [(variant, arch) for variant in variants]
    if processes == 1:
        yield from map(_compile, work)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile, work)


def _compile(work: tuple[str, int]) -> Compiled:
    variant, arch = work
    _aim_at(arch)
    kept = _kept(variant)
    if kept.exists():
        return Compiled(**json.loads(kept.read_text(encoding="utf-8")))
    knobs.compilation.always_compile = knobs.compilation.store_binary_only = True
    knobs.nvidia.dump_ptxas_log = True  # to stdout
    with redirect_stdout(StringIO()) as log:
        done = compiled(variant)
    found = Compiled(
        kernel=json.loads(variant)[1],
        shared=done.metadata.shared,
        registers=int(re.findall(r"Used (\d+) registers", log.getvalue())[-1]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue()))),
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    written = kept.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(asdict(found)), encoding="utf-8")
    written.replace(kept)
    return found


def _kept(variant: str) -> Path:
    """The file with the result, named by all that it depends on."""
    target = driver.active.get_current_target()
    about = [triton.__version__, str(target), source_hash(variant), variant]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return Path(knobs.cache.dir) / "quire-variants" / f"{name}.json"


def _aim_at(arch: int) -> None:
    shared_memory.HOPPER = KIB[arch] * 1024
    shared_memory.shared_memory.cache_clear()
    driver.set_active(TargetDriver(GPUTarget("cuda", arch, 32)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, nargs="+", choices=KIB, default=[*KIB])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))


def run(options: argparse.Namespace) -> None:
    """Prints a table; exits with 1 if a variant spills."""
    bad = 0
    names = "| model | GPU | variants | distinct | most registers | spilled |"
    print(f"Triton {triton.__version__}\n\n{names}\n|---|---|---|---|---|---|", flush=True)
    for model in options.model:
        for arch in options.arch:
            # Kernels keep the first GPU that a process aims at.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                variants = alone.submit(launched, MODELS[model], arch).result()
            chosen = distinct(variants.values())
            found = list(compile_all(chosen, arch, processes=options.processes))
            spills: dict[str, int] = {}
            for each in found:
                if each.spilled:
                    spills[each.kernel] = max(spills.get(each.kernel, 0), each.spilled)
            bad += len(spills)
            cells = (len(variants), len(found), max(each.registers for each in found))
            shown = ", ".join(f"{name}: {size} bytes" for name, size in spills.items()) or "nothing"
            print(f"| {model} | sm_{arch} | {' | '.join(map(str, cells))} | {shown} |", flush=True)
    if bad:
        raise SystemExit(1)
