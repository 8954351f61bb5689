"""Every launch of a runner compiles for a Hopper GPU, where there is none.

The interpreter checks no types: what it computes, the compiler may refuse. So a runner of the shape
that is measured, cut to one layer and few rows, notes what its warm-up launches, and that is
compiled. (What tiles of more rows compile to is in `test_kernels_compile`, and
`python -m loadtest.bench gpu-variants` compiles everything, for other GPUs too.) A process of its
own, because in this one Triton interprets.
"""

from __future__ import annotations

import pytest

from tests.support.builders import found_compiling

PROGRAM = r"""
import json, warnings
warnings.simplefilter("ignore")
from dataclasses import replace
from loadtest.bench.gpu.variants import (
    LLAMA31_8B, QWEN3_600M, SMOLLM2_135M, compile_all, distinct, launched,
)

variants = {}
for config, kv_dtype in (
    (QWEN3_600M, "auto"), (SMOLLM2_135M, "auto"),
    (replace(LLAMA31_8B, sliding_window=600), "float8"),
):
    variants |= launched(
        replace(config, vocab_size=5000), 90,
        kv_dtype=kv_dtype, max_sequences=9, max_batch_tokens=20,
    )
found = {}
for each in compile_all(distinct(variants.values()), 90, processes=1):
    known = found.setdefault(each.kernel, [0, 0, 0])
    known[0], known[1] = known[0] + 1, max(known[1], each.shared)
    known[2] += each.spilled
print(json.dumps(found))
"""


@pytest.mark.kernels
@pytest.mark.timeout(3000)  # some seventy compilations, if their results are not in Triton's cache
def test_every_launch_of_a_runner_compiles() -> None:
    found = found_compiling(PROGRAM)
    assert {
        "_attend",
        "_list_items",
        "_product",
        "_shrink",
        "_expand",
        "_head",
        "_rotate_and_store",
        "_sample_plain",
        "_count",
        "_find",
    } <= found.keys()
    for name, (variants, shared, spilled) in found.items():
        assert variants > 0, name
        assert shared <= 227 * 1024, name
        assert spilled == 0, name
