"""What kernels compile to, for GPUs that are not there: instructions, registers, loads in flight.

A process of its own, because in this one Triton interprets. A tile of every product, of the head,
and attention for each head size, must use the warp group's instruction with one and the same shape
but for the number of columns: what exactness over batch sizes rests on.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.builders import found_compiling

PROGRAM = r"""
import json, os, re, subprocess, tempfile, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from model.kernels import attention, head, matmul, sampling, work_list
from model.kernels.shared_memory import stages_within

LIMITS = {80: 163, 90: 227, 100: 227}  # KiB of shared memory per program
CHIPS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
found = {}

def compiled(name, arch, kernel, types, constants, **options):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options["enable_fp_fusion"] = False
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assembly = done.asm["ptx"]
    found[f"{name}, sm_{arch}"] = {
        "arch": arch,
        "stages": options.get("num_stages", 0),
        "instructions": sorted(set(re.findall(r"wgmma.mma_async\S*?(m\d+n\d+k\d+)", assembly))),
        "mma": len(re.findall(r"[^_]mma.sync", assembly)),
        "tcgen05": len(re.findall(r"tcgen05.mma", assembly)),
        "copies": sorted(set(re.findall(r"cp.async.c[ag].* \[.*?\], (0x\w+)", assembly))),
        "waits": waits_in_loops(done.asm["ttgir"]),
        "shared": done.metadata.shared / 1024 / LIMITS[arch],
        "spilled": spilled(assembly, arch),
    }

def waits_in_loops(text):
    # How many copies may still be in flight where a loop that computes waits for its own.
    waits, depth = [], 0
    for line in text.splitlines():
        if "ttg.async_wait %" in line:
            number = int(re.search(r"num = (\d+)", line)[1])
            waits.append((len(line) - len(line.lstrip()), number))
    deepest = max((indent for indent, _ in waits), default=0)
    return [number for indent, number in waits if indent == deepest]

def spilled(assembly, arch):
    # Bytes that the assembler moves out of registers.
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(assembly)
        source.flush()
        chip = f"--gpu-name={CHIPS[arch]}"
        said = subprocess.run(
            [get_ptxas(arch).path, "-v", chip, source.name, "-o", os.devnull], check=True,
            capture_output=True, text=True,
        ).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))

def tiling_of(rows, arch):
    tiling = matmul.tiling_for(rows, limit=LIMITS[arch] * 1024)
    stages = stages_within(LIMITS[arch] * 1024, stage=tiling.stage_bytes(2), most=tiling.stages)
    return (
        dict(ROWS=tiling.rows, OUTPUTS=tiling.outputs, INPUTS=matmul.INPUTS),
        dict(num_warps=tiling.warps, num_stages=stages),
    )

pointers = {name: "*bf16" for name in ("x_ptr", "w_ptr", "bias_ptr")}

def product(rows, apart, arch):
    tile, options = tiling_of(rows, arch)
    compiled(
        f"product of {rows} apart {apart}", arch, matmul._product,
        {**pointers, "y_ptr": "*fp32" if apart else "*bf16", "M": "i32", "x_stride": "i32"},
        dict(N=4096, K=1024, PART=256, PARTS_HERE=1 if apart else 4, HAS_BIAS=False, **tile),
        **options,
    )

def head_of(rows, stored, vocab, arch):
    tile, options = tiling_of(rows, arch)
    compiled(
        f"head of {rows} stored {stored} over {vocab}", arch, head._head,
        {**pointers, "logits_ptr": "*fp32", "values_ptr": "*fp32", "ids_ptr": "*i32",
         "M": "i32", "x_stride": "i32"},
        dict(N=vocab, K=1024, PART=1024, PARTS=1, STORED=stored, **tile), **options,
    )

def attention_of(dim, arch, stored="*bf16", block_size=16, causal=True):
    types = {name: "*i32" for name in ("table_ptr", "tiles_ptr", "items_ptr", "counts_ptr")}
    types |= {"q_ptr": "*bf16", "out_ptr": "*bf16", "acc_ptr": "*fp32", "ml_ptr": "*fp32"}
    types |= {"table_stride": "i32", "scale": "fp32", "window": "i32"}
    width, split = triton.next_power_of_2(dim), work_list.SPLIT
    stages = stages_within(
        LIMITS[arch] * 1024, stage=2 * attention.STEP * width * (2 if stored == "*bf16" else 1),
        fixed=work_list.ROWS * width * 2, most=3 if width <= 128 else 2,
    )
    compiled(
        f"attention {dim} {stored} {block_size} {causal}", arch, attention._attend,
        {**types, "keys_ptr": stored, "values_ptr": stored},
        dict(BLOCK_SIZE=block_size, SPLIT=split, STEP=attention.STEP, ROWS=work_list.ROWS,
             SPLIT_BLOCKS=triton.next_power_of_2((split - 1) // block_size + 2),
             WINDOWED=True, CAUSAL=causal, H=16, K=8, D=dim, BLOCK_D=width),
        num_warps=4 if width <= 128 else 8, num_stages=stages,
    )

for rows in (1, 32, 64, 128, 256):
    for apart in (False, True):
        product(rows, apart, 90)
    for stored in (False, True):
        head_of(rows, stored, 151936, 90)
head_of(1, True, 32000, 90)
for dim in (64, 80, 96, 128, 256):
    attention_of(dim, 90)
attention_of(128, 90, "*fp8e4nv")
attention_of(128, 90, block_size=64)
for dim in (32, 64):
    attention_of(dim, 90, block_size=1, causal=False)
for arch in (80, 100):
    for rows in (1, 128, 256):
        product(rows, rows == 1, arch)
    head_of(1, False, 49152, arch)
    for dim in (64, 128, 256):
        attention_of(dim, arch)

types = {name: "*fp32" for name in ("logits_ptr", "values_ptr", "value_ptr", "largest_ptr")}
integers = ("state_ptr", "batch_slots_ptr", "ids_ptr", "id_ptr", "tokens_ptr")
types |= {name: "*i32" for name in integers}
types |= {"sums_ptr": "*i64", "V": "i32", "stride": "i32"}
for name, kernel, constants in (
    ("argmax", head._argmax, dict(N=38, CHUNK=4096)),
    ("merge", head._merge, dict(N=2374, LANES=4096)),
    ("sums", sampling._sums, dict(N=38, CHUNK=4096)),
    ("plain", sampling._sample_plain, dict(N=38, CHUNK=4096, LANES=64)),
    ("cut", sampling._sample_cut, dict(BLOCK=8192)),
):
    compiled(f"sampling: {name}", 90, kernel, types, constants, num_warps=8)
print(json.dumps(found))
"""


@pytest.mark.kernels
@pytest.mark.timeout(3000)  # some fifty compilations, if they are not in Triton's cache
def test_what_kernels_compile_to() -> None:
    for name, facts in found_compiling(PROGRAM).items():
        check_resources(name, facts)
        if not name.startswith("sampling"):
            check_instructions(name, facts)
            check_loops(name, facts)


def check_resources(name: str, facts: dict[str, Any]) -> None:
    """All fits into shared memory, and products and sampling keep everything in registers."""
    assert facts["shared"] <= 1, name
    few = 0
    if name.startswith("attention"):  # of wide heads, outside the loop over keys
        few = 448 if facts["arch"] == 80 or name.startswith("attention 256") else 192
    assert facts["spilled"] <= few, name


def check_instructions(name: str, facts: dict[str, Any]) -> None:
    """On Hopper one matrix instruction, but for its columns; elsewhere each chip's own."""
    if facts["arch"] == 90:
        assert facts["instructions"], name
        assert all(shape.startswith("m64n") for shape in facts["instructions"]), name
        assert all(shape.endswith("k16") for shape in facts["instructions"]), name
        assert not facts["mma"], name
    else:
        assert facts["mma" if facts["arch"] == 80 else "tcgen05"], name


def check_loops(name: str, facts: dict[str, Any]) -> None:
    """Two copies per step: a loop of n stages waits for its own and leaves n - 2 steps in flight.

    Attention once waited for everything: the block table was read in its loop. Copies move 16
    bytes, or the same loop needs eight times as many instructions.
    """
    assert facts["stages"] >= 2, name
    assert set(facts["waits"]) == {2 * (facts["stages"] - 2)}, name
    assert facts["copies"] == ["0x10"], name
