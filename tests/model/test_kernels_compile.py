"""The kernels compile for a Hopper GPU, where there is none: to its matrix instructions, unspilled.

A process of its own, because in this one Triton interprets. A tile of every product, of the head,
and attention for each head size, must use the warp group's instruction with one and the same shape
but for the number of columns: what exactness over batch sizes rests on.
"""

from __future__ import annotations

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

def compiled(kernel, types, constants, **options):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assembly = done.asm["ptx"]
    shapes = re.findall(r"wgmma.mma_async\S*?(m\d+n\d+k\d+)", assembly)
    return {
        "instructions": sorted(set(shapes)),
        "others": len(re.findall(r"[^_]mma.sync", assembly)),
        "shared": done.metadata.shared,
        "spilled": spilled(assembly),
    }

def spilled(assembly):
    # Bytes that the assembler moves out of registers.
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(assembly)
        source.flush()
        said = subprocess.run(
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source.name, "-o", os.devnull],
            check=True, capture_output=True, text=True,
        ).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))

found = {}
pointers = {name: "*bf16" for name in ("x_ptr", "w_ptr", "bias_ptr")}
for rows in (1, 32, 64, 128, 256):
    for apart in (False, True):
        tiling = matmul.tiling_for(rows)
        found[f"product of {rows} apart {apart}"] = compiled(
            matmul._product,
            {**pointers, "y_ptr": "*fp32" if apart else "*bf16", "M": "i32", "x_stride": "i32"},
            dict(N=4096, K=1024, PART=256, PARTS_HERE=1 if apart else 4, HAS_BIAS=False,
                 ROWS=tiling.rows, OUTPUTS=tiling.outputs, INPUTS=matmul.INPUTS),
            num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=False,
        )
for rows in (1, 32, 64, 128, 256):
    for stored in (False, True):
        for vocab in (32000, 151936):
            tiling = matmul.tiling_for(rows)
            found[f"head of {rows} stored {stored} over {vocab}"] = compiled(
                head._head,
                {**pointers, "logits_ptr": "*fp32", "values_ptr": "*fp32", "ids_ptr": "*i32",
                 "M": "i32", "x_stride": "i32"},
                dict(N=vocab, K=1024, PART=1024, PARTS=1, STORED=stored, ROWS=tiling.rows,
                     OUTPUTS=tiling.outputs, INPUTS=matmul.INPUTS),
                num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=False,
            )
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
    found[f"sampling: {name}"] = compiled(
        kernel, types, constants, num_warps=8, enable_fp_fusion=False
    )
types = {name: "*i32" for name in ("table_ptr", "tiles_ptr", "items_ptr", "counts_ptr")}
types |= {"q_ptr": "*bf16", "out_ptr": "*bf16", "acc_ptr": "*fp32", "ml_ptr": "*fp32"}
types |= {"table_stride": "i32", "scale": "fp32", "window": "i32"}
for dim in (64, 96, 128):
    for stored in ("*bf16", "*fp8e4nv"):
        found[f"attention {dim} {stored}"] = compiled(
            attention._attend, {**types, "keys_ptr": stored, "values_ptr": stored},
            dict(BLOCK_SIZE=64, SPLIT=work_list.SPLIT, STEP=attention.STEP, ROWS=work_list.ROWS,
                 WINDOWED=True, H=16, K=8, D=dim, BLOCK_D=triton.next_power_of_2(dim)),
            num_warps=4, num_stages=3, enable_fp_fusion=False,
        )
print(json.dumps(found))
"""


@pytest.mark.kernels
def test_kernels_compile_to_the_warp_groups_instruction() -> None:
    for name, facts in found_compiling(PROGRAM).items():
        assert bool(facts["instructions"]) != name.startswith("sampling"), name
        assert all(shape.startswith("m64n") for shape in facts["instructions"]), name
        assert all(shape.endswith("k16") for shape in facts["instructions"]), name
        assert not facts["others"], name
        assert facts["shared"] <= 227 * 1024, name
        few = 128 if name.startswith("attention") else 0  # wide heads: once, outside the loops
        assert facts["spilled"] <= few, name
