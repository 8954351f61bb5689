"""Every launch of a runner compiles for a Hopper GPU, where there is none.

The interpreter checks no types: what it computes, the compiler may refuse. So a runner of the shape
that is measured, cut to one layer and few rows, notes what its warm-up launches, and that is
compiled. (What tiles of more rows compile to is in `test_kernels_compile`.) A process of its own,
because in this one Triton interprets.
"""

from __future__ import annotations

import pytest

from tests.support.builders import found_compiling

PROGRAM = r"""
import json, warnings
warnings.simplefilter("ignore")
from dataclasses import replace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from loadtest.bench.gpu.models import LLAMA31_8B, QWEN3_600M
from model.runners import RunnerOptions
from model.runners.cuda.build import build_runner
from model.runners.cuda.compile_ahead import TargetDriver, compiled, recorded
from model.transformer import Transformer

driver.set_active(TargetDriver(GPUTarget("cuda", 90, 32)))

def zeros_of(allocate):  # nothing is computed, and token 0 is a token
    return lambda *args, **kwargs: allocate(*args, **kwargs).zero_()

torch.empty, torch.empty_like = zeros_of(torch.empty), zeros_of(torch.empty_like)

variants = {}
for config, kv_dtype in ((QWEN3_600M, "auto"), (replace(LLAMA31_8B, sliding_window=600), "float8")):
    config = replace(config, num_layers=1, vocab_size=5000)
    with torch.device("meta"):
        tensors = Transformer(config).state_dict()
    weights = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in tensors.items()}
    options = RunnerOptions(
        dtype="bfloat16", kv_dtype=kv_dtype, device="cpu", num_blocks=64,
        max_sequences=9, max_batch_tokens=20,
    )
    def start():
        build_runner(config, weights, options=options, digest="none", check=None).warm_up()
    variants |= recorded(start)
found = {}
for name, variant in variants.items():
    known = found.setdefault(name.split(" ")[0].split(".")[-1], [0, 0])
    known[0], known[1] = known[0] + 1, max(known[1], compiled(variant).metadata.shared)
print(json.dumps(found))
"""


@pytest.mark.kernels
@pytest.mark.timeout(3000)  # some seventy compilations, if they are not in Triton's cache
def test_every_launch_of_a_runner_compiles() -> None:
    found = found_compiling(PROGRAM)
    assert {
        "_attend",
        "_merge",
        "_list_items",
        "_product",
        "_head",
        "_rotate_and_store",
        "_sample_plain",
    } <= found.keys()
    for name, (variants, shared) in found.items():
        assert variants > 0, name
        assert shared <= 227 * 1024, name
