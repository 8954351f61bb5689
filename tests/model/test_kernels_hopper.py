"""Every launch of a runner compiles for a Hopper GPU, where there is none.

The interpreter checks no types: what it computes, the compiler may refuse. So a runner of the shape
that is measured, cut to one layer, does its steps with launches that compile and compute nothing.
A process of its own, because in this one Triton interprets.
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
from triton.runtime.jit import JITFunction

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

found = {}
compile_and_launch = JITFunction.run

def compile_alone(self, *args, grid, warmup, **kwargs):
    kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs)
    known = found.setdefault(self.__name__, {"variants": 0, "shared": 0, "hashes": []})
    if kernel.hash not in known["hashes"]:
        known["hashes"].append(kernel.hash)
        known["shared"] = max(known["shared"], kernel.metadata.shared)
    return kernel

driver.set_active(Hopper())
JITFunction.run = compile_alone

def zeros_of(allocate):  # nothing is computed, and token 0 is a token
    return lambda *args, **kwargs: allocate(*args, **kwargs).zero_()

torch.empty, torch.empty_like = zeros_of(torch.empty), zeros_of(torch.empty_like)

from loadtest.bench.gpu.models import LLAMA31_8B, QWEN3_600M
from loadtest.bench.gpu.offline import Offline, Workload
from model.runners import RunnerOptions
from model.runners.cuda.build import build_runner
from model.transformer import Transformer

for config, kv_dtype in ((QWEN3_600M, "auto"), (replace(LLAMA31_8B, sliding_window=600), "float8")):
    config = replace(config, num_layers=1, vocab_size=5000)
    with torch.device("meta"):
        tensors = Transformer(config).state_dict()
    weights = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in tensors.items()}
    options = RunnerOptions(
        dtype="bfloat16", kv_dtype=kv_dtype, device="cpu", block_size=64, num_blocks=64,
        max_sequences=9, max_batch_tokens=160,
    )
    runner = build_runner(config, weights, options=options, digest="none", check=None)
    if kv_dtype == "auto":
        runner.warm_up()
    offline = Offline(runner, budget=160)
    for temperature in (0.6, 0.0):
        offline.run(Workload(name="", lengths=((70, 3), (5, 4)), temperature=temperature))
print(json.dumps({name: [len(k["hashes"]), k["shared"]] for name, k in found.items()}))
"""


@pytest.mark.kernels
@pytest.mark.timeout(400)  # some ninety compilations, where they are not in Triton's cache
def test_every_launch_of_a_runner_compiles() -> None:
    found = found_compiling(PROGRAM)
    assert {
        "_attend",
        "_merge",
        "_list_items",
        "_product",
        "_rotate_and_store",
        "_sample_plain",
    } <= found.keys()
    for name, (variants, shared) in found.items():
        assert variants > 0, name
        assert shared <= 227 * 1024, name
