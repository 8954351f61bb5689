"""The GPU benchmark runs from end to end in miniature, and its workload is the published one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loadtest.gpu_models import LLAMA31_8B, QWEN3_600M, Shape
from loadtest.gpu_offline import w1


def test_the_workload_is_nano_vllms() -> None:
    assert (w1().tokens_in, w1().tokens_out) == (142_827, 133_966)


def test_what_a_step_must_read() -> None:
    small, large = Shape("", QWEN3_600M), Shape("", LLAMA31_8B)
    assert small.weight_bytes == pytest.approx(1.19e9, rel=0.01)
    assert small.kv_bytes == 114_688
    assert large.weight_bytes == pytest.approx(15.0e9, rel=0.01)
    assert large.kv_bytes == 131_072


@pytest.mark.kernels
def test_it_runs_in_miniature(tmp_path: Path) -> None:
    """In a process of its own: the interpreter warns of what a GPU computes silently."""
    variables = dict(os.environ)
    if not torch.cuda.is_available():
        variables["TRITON_INTERPRET"] = "1"
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "loadtest.gpu_bench", "--smoke", "--out", str(out)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    assert {"ceilings", "kernel: attention", "kernel: product", "steps", "exact", "W1"} <= set(
        found
    )
    assert [row["by"] for row in found["W1"]] == ["runner", "engine", "HTTP"]
    assert all(row["tokens/s"] > 0 for row in found["steps"])
