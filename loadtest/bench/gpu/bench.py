"""Bench: the context of a stage of the GPU benchmark: models, timing, result tables.

Times are the device's own (events), after a first call that compiles and loads. Each row is
printed and written immediately, so that a stage that is cut off leaves its results so far.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loadtest.bench.gpu.models import LLAMA31_8B, QWEN3_600M, TINY, RandomWeights, Shape
from model.runners import RunnerOptions
from model.runners.cuda.accelerator import CudaAccelerator, median_seconds

if TYPE_CHECKING:
    from model.runners.cuda.runner import CudaRunner

_DATASHEET = {"H200": 4.8e12, "H100": 3.35e12}  # bytes/s; other chips are compared with a copy
DEFAULT_STEP = 2048
_CAPTURED = 8  # calls in one CUDA graph

Row = dict[str, Any]


class OutOfTime(Exception):
    """The stage is out of time; its rows so far are written."""


@dataclass(kw_only=True)
class Bench:
    """Models, clock and tables of one stage."""

    smoke: bool  # in miniature, also on a CPU
    device: torch.device
    out: Path
    deadline: float  # of time.monotonic()
    tables: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def models(self) -> list[Shape]:
        if self.smoke:
            return [Shape("tiny", TINY)]
        return [Shape("Qwen3-0.6B", QWEN3_600M), Shape("Llama-3.1-8B", LLAMA31_8B)]

    @property
    def batches(self) -> tuple[int, ...]:
        return (2,) if self.smoke else (1, 8, 32, 128, 256)

    @property
    def budget(self) -> int:
        """Maximum tokens per step: a server's own default."""
        return 16 if self.smoke else DEFAULT_STEP

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.smoke else torch.bfloat16

    @property
    def left(self) -> float:
        """Remaining seconds of the stage."""
        return self.deadline - time.monotonic()

    def check_time(self) -> None:
        """Called between measurements. Raises OutOfTime."""
        if self.left <= 0:
            raise OutOfTime

    def add(self, table: str, row: Row) -> None:
        """Adds a row, prints it and writes all tables."""
        rows = self.tables.setdefault(table, [])
        rows.append(row)
        if len(rows) == 1:
            print(f"\n{table}\n" + "  ".join(f"{name:>{_width(name)}}" for name in row))
        cells = (f"{_text(value):>{_width(name)}}" for name, value in row.items())
        print("  ".join(cells), flush=True)
        self.out.write_text(json.dumps(self.tables), encoding="utf-8")

    def seconds(self, work: Callable[[], object], *, repeats: int = 20) -> float:
        """Median device time of one call."""
        if self.device.type == "cuda":
            return median_seconds(work, repeats=repeats)
        work()
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def replayed(self, work: Callable[[], object]) -> float:
        """Time per call in a CUDA graph of several: without gaps of the host."""
        if self.device.type == "cpu":
            return self.seconds(work)

        def several() -> None:
            for _ in range(_CAPTURED):
                work()

        return self.seconds(CudaAccelerator(self.device).capture(several)) / _CAPTURED

    def copy_rate(self) -> float:
        """Bytes/s, read and written, of a large copy: the reference for kernels."""
        size = 2**16 if self.smoke else 2**31
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds(lambda: target.copy_(source))

    def bandwidth(self) -> tuple[float, str]:
        """Bytes/s as the reference for steps, and the source of the figure."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            for chip, rate in _DATASHEET.items():
                if chip in name:
                    return rate, f"data sheet, {chip}"
        return self.copy_rate(), "copy"

    def runner(
        self, shape: Shape, *, library: bool = False, proven: bool = False, **options: int | str
    ) -> CudaRunner:
        """A runner over random weights.

        `library`: with the products of the vendor BLAS, which are not exact. `proven`: it tries its
        exactness at the start, as a runner that serves does.
        """
        from model.kernels.matmul import multiply, multiply_by_vendor_blas
        from model.runners.cuda.build import build_runner

        fields: Row = {
            "dtype": "float32" if self.smoke else "bfloat16",
            "device": self.device.type,
            "max_sequences": max(self.batches),
            "max_batch_tokens": self.budget,
            "memory_share": 0.9,  # the setting's default
            **({"block_size": 4, "num_blocks": 64} if self.smoke else {}),
            # As a server does, if the stage's environment allows it.
            "vendor_blas": "CUBLASLT_WORKSPACE_SIZE" in os.environ,
            **options,
        }
        return build_runner(
            shape.config,
            RandomWeights(shape.config, self.device),
            options=RunnerOptions(**fields),
            digest="random",
            product=multiply_by_vendor_blas if library else multiply,
            check="by options" if proven else None,
        )

    def release(self, runner: CudaRunner) -> None:
        """Frees a runner's memory before the next one is built."""
        runner.close()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _width(name: str) -> int:
    return max(len(name), 14 if not name.isdigit() else 3)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "=" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)
