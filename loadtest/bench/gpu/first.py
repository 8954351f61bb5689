"""What a GPU runs first: kernels compiled ahead, checked by NVIDIA's sanitizers, then by our tests.

    precompile   every kernel that the measured runners launch, compiled in parallel
    sanitize     one attention and one product under memcheck and racecheck of compute-sanitizer
    tests        the kernels' tests, compiled, in bfloat16

It needs torch, triton, numpy and pytest; the fixtures of the whole suite are left out, because they
need the packages of the service.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from loadtest.bench.gpu.bench import Bench

ROOT = Path(__file__).parents[3]
KERNEL_TESTS = (
    "kernels", "kernels_products", "kernels_attention", "kernels_head", "kernels_sampling",
    "kernels_fp64",
)  # fmt: skip
PYTEST = [
    *(sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(ROOT), "--noconftest"),
    *(
        "-p",
        "tests.support.one_order",
        "-p",
        "no:cacheprovider",
        "--import-mode",
        "importlib",
        "-q",
    ),
]
"""Without the project's settings, and of its fixtures with `one_order` alone."""


class Unsound(Exception):
    """A sanitizer or a test failed; the message names it."""


def precompile(bench: Bench) -> None:
    """Builds each runner that later stages build, with a pool of a few blocks."""
    for shape in bench.models:
        for kv_dtype in ("auto", "float8"):
            bench.check_time()
            began = time.perf_counter()
            runner = bench.runner(shape, kv_dtype=kv_dtype, num_blocks=64)
            row = {"model": shape.name, "kv_dtype": kv_dtype}
            bench.add("precompile", {**row, "seconds": time.perf_counter() - began})
            bench.release(runner)


def sanitize(bench: Bench) -> None:
    """Raises Unsound if a tool finds an error. Without the tools there is one row that says so."""
    tool = shutil.which("compute-sanitizer")
    work = [sys.executable, "-m", "loadtest.bench.gpu.first"]
    if bench.device.type == "cpu" or tool is None:
        subprocess.run(work, check=True, cwd=ROOT)
        bench.add("sanitize", {"tool": "none", "errors": "compute-sanitizer was not found"})
        return
    found = []
    for name in ("memcheck", "racecheck"):
        bench.check_time()
        command = [tool, "--tool", name, "--error-exitcode", "9", *work]
        status = subprocess.run(command, check=False, cwd=ROOT).returncode
        bench.add("sanitize", {"tool": name, "errors": status != 0})
        found += [name] if status else []
    if found:
        raise Unsound(f"compute-sanitizer: {', '.join(found)}")


def test_kernels(bench: Bench) -> None:
    """Raises Unsound if a test fails; on a CPU one test of each file, interpreted."""
    paths = [str(ROOT / f"tests/model/test_{name}.py") for name in KERNEL_TESTS]
    failed = []
    for path in paths:
        bench.check_time()
        command = [*PYTEST, path, *(["--collect-only"] if bench.smoke else [])]
        began = time.perf_counter()
        status = subprocess.run(command, check=False, cwd=ROOT).returncode
        seconds = time.perf_counter() - began
        bench.add("tests", {"file": Path(path).name, "passed": status == 0, "seconds": seconds})
        failed += [Path(path).name] if status else []
    if failed:
        raise Unsound(f"tests failed: {', '.join(failed)}")


def main() -> None:
    """One product in parts and one whole, and an attention over several splits, beside torch's."""
    from model.kernels.attention import Partials, attention_programs, paged_attention
    from model.kernels.matmul import multiply
    from model.kernels.work_list import WorkList
    from model.packed_weights import to_float8

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = torch.randn(256, 512, device=device).to(dtype)
    for rows in (3, 130):
        x = torch.randn(rows, 512, device=device).to(dtype)
        given = multiply(x, weight).sum_parts(dtype).float()
        torch.testing.assert_close(given, x.float() @ weight.float().T, atol=0.5, rtol=0.05)
        packed = to_float8(weight)
        given = multiply(x, packed.values_NK, scales=packed.scales).sum_parts(dtype)
        if not torch.equal(given, multiply(x, packed.to(dtype)).sum_parts(dtype)):
            raise Unsound("weights in float8 have other bits than the same in bfloat16")
    context = 600
    work = WorkList(max_rows=41, max_sequences=2, max_context=context, group=2, device=device)
    q, keys, values = (
        torch.randn(*shape, device=device).to(dtype)
        for shape in ((41, 4, 64), (2 * 608, 2, 64), (2 * 608, 2, 64))
    )
    starts = torch.tensor([0, 1, 41], dtype=torch.int32, device=device)
    contexts = torch.full((2,), context, dtype=torch.int32, device=device)
    work.fill(starts, contexts, starts.new_tensor([0, 1]), window=None)
    out = paged_attention(
        q, keys, values,
        torch.arange(76, dtype=torch.int32, device=device).view(2, 38),
        work=work,
        partials=Partials(work, num_heads=4, head_dim=64, device=device),
        block_size=16, scale=0.125, window=None,
        programs=attention_programs(device),
    )  # fmt: skip
    if not out.isfinite().all():
        raise Unsound("attention gave NaN")


if __name__ == "__main__":
    main()
