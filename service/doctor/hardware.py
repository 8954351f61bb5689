"""Processor, kernels, threads, memory and GPU, and the speed that they allow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from model.config import ModelConfig
from model.limits import usable_cores, usable_cpus
from model.native import NativeUnavailable
from model.native.library import NativeLibrary
from model.native.roof import NoRoof, Roof, Weights, count_weights, probe
from service.doctor import Finding, Level
from service.doctor.machine import Machine
from service.settings import Settings
from service.startup import runner_options

ROWS = 16
"""Answers at a time, for the second figure of the expected speed."""
_DRIVER = Path("/proc/driver/nvidia/version")


def check_kernels(machine: Machine) -> Finding:
    """Which variant of the native code runs."""
    flags = ", ".join(machine.flags) or "no known vector instructions"
    try:
        variants = NativeLibrary().variants
    except NativeUnavailable as error:
        return Finding(
            "kernels",
            f"{flags}; no native library, torch serves instead, several times slower",
            Level.BAD,
            f"{error}; install g++ or clang++, then: python -m model.native.build",
        )
    text = f"{flags}; the variant {variants[0]} runs, of {', '.join(variants)}"
    if variants[0] == "portable":
        return Finding("kernels", text, Level.NOTE, "a CPU with AVX2 is several times faster")
    return Finding("kernels", text)


def check_threads(machine: Machine, settings: Settings) -> Finding:
    """The threads of a step, against what the container allows."""
    cpus, cores = usable_cpus(), usable_cores()
    threads = settings.threads or cpus
    text = f"{threads} of a step; {machine.cpus} CPUs, of which {cpus} may be used, {cores} cores"
    if threads > cpus:
        advice = f"threads above the limit of CPUs wait for one another: --threads {cpus}"
        return Finding("threads", text, Level.NOTE, advice)
    if cpus == 1:
        advice = "steps, HTTP and the journal share one CPU: allow two or more"
        return Finding("threads", text, Level.NOTE, advice)
    return Finding("threads", text)


def check_memory(
    machine: Machine, settings: Settings, *, limit: int | None, weights: Sequence[Weights]
) -> Finding:
    """What 8-bit weights and the KV cache need of it. `limit` is the container's, in bytes."""
    usable = machine.memory if limit is None else min(machine.memory, limit)
    pool = settings.kv_memory or runner_options(settings).kv_memory
    needed = pool + sum(int(each.layers * each.layer_bytes + each.head) for each in weights)
    text = f"{usable / 2**30:.1f} GiB" + (" (the container's limit)" if usable == limit else "")
    text += f"; weights and KV cache need {needed / 2**30:.1f} GiB"
    if needed > 0.8 * usable:
        advice = f"lower --kv-memory (now {pool / 2**20:,.0f} MiB) or allow more memory"
        return Finding("memory", text, Level.BAD, advice)
    return Finding("memory", text)


def check_speed(configs: Sequence[ModelConfig], settings: Settings) -> Iterator[Finding]:
    """The probed rates of the machine, and what they allow at most. Takes seconds."""
    cpus = usable_cpus()
    try:
        roof = probe(threads=sorted({1, settings.threads or cpus}))
    except NoRoof as reason:
        yield Finding("speed", "was not probed", Level.NOTE, str(reason))
        return
    text = (
        f"memory {roof.bytes_a_second / 1e9:,.1f} GB/s, int8"
        f" {2 * roof.products_a_second / 1e12:,.2f} TOPS ({roof.variant})"
    )
    load = os.getloadavg()[0]
    if load > max(1, cpus / 2):
        advice = f"other processes are at work (load {load:.1f}): repeat it when they are not"
        yield Finding("speed", text, Level.NOTE, advice)
    else:
        yield Finding("speed", text)
    for config in configs:
        yield expected(roof, count_weights(config), four_bit=settings.dtype == "int4")


def expected(roof: Roof, weights: Weights, *, four_bit: bool) -> Finding:
    """The upper bound of tokens per second of a model in 8 bits."""
    one, many = (roof.decode(weights, rows=rows) for rows in (1, ROWS))
    prompt = roof.prefill(weights, tokens=512)
    return Finding(
        "expected",
        f"at most {one:,.0f} tokens/s of one answer, {many:,.0f} of {ROWS} at a time,"
        f" {prompt:,.0f} of a prompt" + (" (int4 reads less)" if four_bit else ""),
        Level.OK,
        "if it is far slower, other processes or a limit of CPUs take its time; see threads",
    )


def check_gpu() -> Iterator[Finding]:
    """The GPUs that torch can use, and the driver."""
    import torch

    text = _DRIVER.read_text(encoding="utf-8") if _DRIVER.is_file() else ""
    version = re.search(r"Module.*?(\d+\.[\d.]+)", text)
    driver = f"driver {version[1]}" if version else "no NVIDIA driver"
    if not torch.cuda.is_available():
        if version is None:
            yield Finding("GPU", f"none ({driver})")
        else:
            advice = "install a torch with CUDA for this driver; in a container: --gpus all"
            yield Finding("GPU", f"torch cannot use it ({driver})", Level.BAD, advice)
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Finding(
            "GPU",
            f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability"
            f" {found.major}.{found.minor}, {driver}, CUDA {torch.version.cuda}",
        )
    if find_spec("triton") is None:
        advice = "for the GPU kernels: pip install 'quire-llm[gpu]'"
        yield Finding("GPU", "Triton is missing, torch serves", Level.NOTE, advice)
