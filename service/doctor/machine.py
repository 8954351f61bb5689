"""The machine: processor, its vector instructions, memory, packages, its container's limit."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "quire-llm", "torch", "transformers", "xllamacpp", "llama-cpp-python", "openvino-genai", "vllm",
)  # fmt: skip
_CGROUPS = Path("/sys/fs/cgroup")
_FLAGS = ("amx_int8", "amx_bf16", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "asimddp", "i8mm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine and its packages."""

    processor: str
    cpus: int  # usable by this process
    flags: list[str]
    memory: int  # bytes
    system: str
    packages: dict[str, str]

    def __str__(self) -> str:
        flags = ", ".join(self.flags) or "no known vector instructions"
        return f"{self.processor}, {self.cpus} CPUs, {self.memory / 2**30:.0f} GiB ({flags})"


def memory_limit() -> int | None:
    """Bytes that the container of this process may use; None: all."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2 of cgroups, and 1
        path = _CGROUPS / name
        if path.is_file():
            text = path.read_text(encoding="ascii").strip()
            return int(text) if text.isdigit() and int(text) < 2**60 else None
    return None


def this_machine() -> Machine:
    path = Path("/proc/cpuinfo")
    fields = read_cpuinfo(path.read_text(encoding="utf-8") if path.is_file() else "")
    known = set(fields.get("flags", fields.get("Features", "")).split())
    return Machine(
        processor=fields.get("model name") or platform.processor() or platform.machine(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        flags=[flag for flag in _FLAGS if flag in known],
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        packages={name: found for name in _PACKAGES if (found := _version(name))},
    )


def read_cpuinfo(text: str) -> dict[str, str]:
    """Fields of the first processor."""
    first, *_ = text.split("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
