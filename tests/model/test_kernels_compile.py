"""What kernels compile to, for GPUs that are not there: instructions, registers, loads in flight.

A process of its own, because in this one Triton interprets. A tile of every product, of the head,
and attention for each head size, must use the warp group's instruction with one and the same shape
but for the number of columns: what exactness over batch sizes rests on.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.builders import found_compiling

PROGRAM = r"""
import json, re, warnings
warnings.simplefilter("ignore")
from contextlib import redirect_stdout
from io import StringIO
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from model.kernels import (
    adapters, attention, cuts, head, matmul, norm, rotary, sampling, tiling, work_list,
)
from model.kernels.shared_memory import stages_within
from model.runners.cuda.compile_ahead import TargetDriver

LIMITS = {80: 163, 90: 227, 100: 227}  # KiB of shared memory per program
found = {}
# What the assembler reports, with the options that Triton gives it.
knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True

def compiled(name, arch, kernel, types, constants, **options):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options["enable_fp_fusion"] = False
    target = GPUTarget("cuda", arch, 32)
    driver.set_active(TargetDriver(target))
    with redirect_stdout(StringIO()) as log:
        done = triton.compile(source, target=target, options=options)
    assembly = done.asm["ptx"]
    found[f"{name}, sm_{arch}"] = {
        "arch": arch,
        "triton": triton.__version__,
        "stages": options.get("num_stages", 0),
        "instructions": sorted(set(re.findall(r"wgmma.mma_async\S*?(m\d+n\d+k\d+)", assembly))),
        "mma": len(re.findall(r"[^_]mma.sync", assembly)),
        "tcgen05": len(re.findall(r"tcgen05.mma", assembly)),
        "copies": sorted(set(re.findall(r"cp.async.c[ag].* \[.*?\], (0x\w+)", assembly))),
        "waits": waits_in_loops(done.asm["ttgir"]),
        "loops": len(re.findall(r"scf.for", done.asm["ttgir"])),
        "before": before_the_wait(assembly, "griddepcontrol.wait", IN_PTX),
        "machine": MACHINE.search(name) and before_the_wait(done.asm["sass"], "ACQBULK", IN_SASS),
        "flushed": len(re.findall(r"mul.ftz", assembly)),
        "shared": done.metadata.shared / 1024 / LIMITS[arch],
        "serialized": "C7515" in log.getvalue(),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue()))),
        "pool_offsets": sorted(set(re.findall(
            r"tt.addptr .*ptr<f8E4M3FN>>?, (?:tensor<[\dx]*)?(i\d+)", done.asm["ttir"]
        ))),
    }

# What touches memory, or prefetches, or starts the next kernel; and of which kernels the machine
# code is read as well, which takes seconds.
IN_PTX = r"\b(?:ld\.(?!param|shared)|st\.(?!shared)|cp\.async|atom|red\.|prefetch|griddep)[\w.:]*"
IN_SASS = r"\b(?:LDG?|STG?|LDGSTS|ATOMG?|REDG?|UBLKCP|UTMA\w*|CCTL|PREEXIT)\b[\w.]*"
MACHINE = re.compile("^(product of 1 apart True stored plain|head of 1 stored True over 3|norm|"
                     "storing|attention 128 .bf16 16 False)")

def before_the_wait(text, wait, pattern):
    # None if it does not wait for the kernels before.
    found = [part for part in re.findall(pattern + "|" + re.escape(wait), text)]
    return found[: found.index(wait)] if wait in found else None

def waits_in_loops(text):
    # How many copies may still be in flight where a loop that computes waits for its own.
    waits, depth = [], 0
    for line in text.splitlines():
        if "ttg.async_wait %" in line:
            number = int(re.search(r"num = (\d+)", line)[1])
            waits.append((len(line) - len(line.lstrip()), number))
    deepest = max((indent for indent, _ in waits), default=0)
    return [number for indent, number in waits if indent == deepest]

def tiling_of(rows, arch):
    tile = tiling.tiling_for(rows, limit=LIMITS[arch] * 1024)
    stages = stages_within(LIMITS[arch] * 1024, stage=tile.stage_bytes(2), most=tile.stages)
    return (
        dict(ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=tiling.INPUTS),
        dict(num_warps=tile.warps, num_stages=stages),
    )

pointers = {name: "*bf16" for name in ("x_ptr", "w_ptr", "bias_ptr", "scale_ptr")}

def product(rows, apart, arch, stored="plain", gated=False):
    tile, options = tiling_of(rows, arch)
    types = {**pointers, "y_ptr": "*fp32" if apart else "*bf16", "M": "i32", "x_stride": "i32"}
    if stored != "plain":
        types |= {"w_ptr": "*i8", "scale_ptr": "*fp32" if stored == "float8" else "*fp16"}
    compiled(
        f"product of {rows} apart {apart} stored {stored} gated {gated}", arch, matmul._product,
        types,
        dict(N=4096, K=1024, PART=256, PARTS_HERE=1 if apart else 4, HAS_BIAS=False,
             GATED=gated, PREFETCH=apart, STORED=stored, **tile),
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

def attention_of(dim, arch, stored="*bf16", block_size=16, windowed=False, causal=True):
    types = {name: "*i32" for name in ("table_ptr", "tiles_ptr", "items_ptr", "counts_ptr")}
    types |= {"q_ptr": "*bf16", "out_ptr": "*bf16", "acc_ptr": "*fp32", "ml_ptr": "*fp32"}
    types |= {"arrivals_ptr": "*i32", "table_stride": "i32", "scale": "fp32", "window": "i32"}
    width, split = triton.next_power_of_2(dim), work_list.SPLIT
    warps, stages = attention.attention_layout(
        width, itemsize=2, kv_itemsize=2 if stored == "*bf16" else 1, limit=LIMITS[arch] * 1024
    )
    compiled(
        f"attention {dim} {stored} {block_size} {windowed} {causal}", arch, attention._attend,
        {**types, "keys_ptr": stored, "values_ptr": stored},
        dict(BLOCK_SIZE=block_size, SPLIT=split, STEP=attention.STEP, ROWS=work_list.ROWS,
             SPLIT_BLOCKS=triton.next_power_of_2((split - 1) // block_size + 2),
             WINDOWED=windowed, CAUSAL=causal, H=16, K=8, D=dim, BLOCK_D=width,
             PARTS_GROUP=2),
        num_warps=warps, num_stages=stages,
    )

def adapters_of(arch):
    types = {name: "*bf16" for name in ("x_ptr", "a_ptr", "b_ptr")} | {"low_ptr": "*fp32"}
    types |= {name: "*i32" for name in ("places_ptr", "adapters_ptr")} | {"M": "i32", "L": "i32"}
    for rows, outputs, warps, parts in ((16, 64, 4, 16), (64, 128, 8, 1), (64, 64, 8, 16)):
        tile = dict(R=48, ROWS=rows, RANKS=adapters.RANKS)
        compiled(
            f"shrink of {rows}", arch, adapters._shrink, types,
            dict(K=14336, PART=1792, INPUTS=tiling.INPUTS, **tile), num_warps=4, num_stages=3,
        )
        compiled(
            f"expand of {rows} in {parts} parts", arch, adapters._expand,
            {**types, "y_ptr": "*bf16" if parts == 1 else "*fp32"},
            dict(N=4096, LOW_PARTS=8, PARTS=parts, OUTPUTS=outputs, **tile),
            num_warps=warps, num_stages=2,
        )

def sampling_of(arch):
    types = {name: "*fp32" for name in ("logits_ptr", "values_ptr", "value_ptr", "largest_ptr")}
    integers = ("state_ptr", "batch_slots_ptr", "ids_ptr", "id_ptr", "tokens_ptr", "counts_ptr")
    types |= {name: "*i32" for name in integers}
    types |= {name: "*i64" for name in ("sums_ptr", "search_ptr", "bins_ptr")}
    types |= {"V": "i32", "stride": "i32", "number": "i32"}
    for name, kernel, constants in (
        ("argmax", head._argmax, dict(N=38, CHUNK=4096)),
        ("merge", head._merge, dict(N=2374, LANES=4096)),
        ("sums", sampling._sums, dict(N=38, CHUNK=4096)),
        ("plain", sampling._sample_plain, dict(N=38, CHUNK=4096, LANES=64)),
        ("count", cuts._count, dict(CHUNK=4096)),
        ("find", cuts._find, dict(N=38, CHUNK=4096, LANES=64)),
    ):
        compiled(f"sampling: {name}", arch, kernel, types, constants, num_warps=8)

def storing(arch):
    types = {"qkv_ptr": "*fp32", "table_ptr": "*fp32", "part_stride": "i32", "num_positions": "i32"}
    types |= {name: "*bf16" for name in ("q_ptr", "q_norm_ptr", "k_norm_ptr")} | {"eps": "fp32"}
    types |= {name: "*fp8e4nv" for name in ("keys_ptr", "values_ptr")}
    types |= {name: "*i32" for name in ("positions_ptr", "kv_slots_ptr")}
    compiled(
        "storing *fp8e4nv", arch, rotary._rotate_and_store, types,
        dict(H=16, K=8, HALF=64, BLOCK=64, HEADS=8, PARTS=2, NORMED=True, ROTARY=True),
        num_warps=4,
    )

def hopper():
    for rows in (1, 32, 64, 128, 256):
        for apart in (False, True):
            for stored in ("plain", "float8", "blocks"):
                product(rows, apart, 90, stored)
        for stored in ("plain", "float8", "blocks"):
            product(rows, False, 90, stored, gated=True)
        for stored in (False, True):
            head_of(rows, stored, 151936, 90)
    head_of(1, True, 32000, 90)
    for dim in (64, 80, 96, 128, 256):
        attention_of(dim, 90)
        attention_of(dim, 90, windowed=True)
    attention_of(128, 90, "*fp8e4nv")
    attention_of(128, 90, block_size=64)
    for dim in (32, 64):
        attention_of(dim, 90, block_size=1, causal=False)
    sampling_of(90)
    storing(90)
    compiled(
        "norm", 90, norm._add_rms_norm,
        {"residual_ptr": "*bf16", "delta_ptr": "*fp32", "weight_ptr": "*bf16", "rows_ptr": "*i32",
         "y_ptr": "*bf16", "part_stride": "i32", "eps": "fp32"},
        dict(C=1024, BLOCK=1024, PARTS=12, SELECTED=False), num_warps=4,
    )
    adapters_of(90)

def other(arch):
    for rows in (1, 128, 256):
        for stored in ("plain", "float8", "blocks"):
            product(rows, rows == 1, arch, stored)
        product(rows, False, arch, gated=True)
    head_of(1, False, 49152, arch)
    for dim in (64, 128, 256):
        attention_of(dim, arch)
    adapters_of(arch)

"""


@pytest.mark.kernels
@pytest.mark.timeout(3000)  # some sixty compilations for Hopper
@pytest.mark.parametrize("work", ["hopper()", "other(80)", "other(100)"])
def test_what_kernels_compile_to(work: str) -> None:
    found = found_compiling(f"{PROGRAM}{work}\nprint(json.dumps(found))")
    assert len(found) > 10
    for name, facts in found.items():
        check_resources(name, facts)
        check_overlap(name, facts)
        if "*fp8" in name:  # its pool's pointers have a type of their own
            check_offsets(name, facts["pool_offsets"])
        if name.startswith(("shrink", "expand")):
            check_adapters(name, facts)
        elif not name.startswith(("sampling", "storing", "norm")):
            check_instructions(name, facts)
            check_loops(name, facts)


def check_resources(name: str, facts: dict[str, Any]) -> None:
    """All fits into shared memory, and all stays in registers, but for heads of 256."""
    assert facts["shared"] <= 1, name
    few = 96 if name.startswith("attention 256") else 0  # outside the loop over keys
    few = 8 if "stored blocks" in name else few  # with 128 rows, of 255 registers
    if facts["triton"].startswith("3.6.") and re.match("attention (80|96) .* True True", name):
        few = 8  # windows over heads that are padded to 128
    assert facts["spilled"] <= few, name


def check_overlap(name: str, facts: dict[str, Any]) -> None:
    """On GPUs that overlap launches, kernels of layers wait before they touch memory: before the
    wait are prefetches of weights and the signal that the next kernel may start. Others are
    launched after all before have ended.
    """
    if facts["arch"] < 90 or name.startswith(("sampling", "shrink", "expand")):
        assert facts["before"] is None, name
        return
    prefetches = "apart True" in name
    expected = {"griddepcontrol.launch_dependents", *["prefetch.global.L2"] * prefetches}
    assert set(facts["before"]) == expected, name
    if facts["machine"] is not None:
        assert set(facts["machine"]) == {"PREEXIT", *["CCTL.E.PF2"] * prefetches}, name


def check_offsets(name: str, widths: list[str]) -> None:
    """A pool may have more than 2**31 elements. Storing adds half a head to such an offset."""
    assert widths == (["i64"] if name.startswith("attention") else ["i32", "i64"]), name


def check_instructions(name: str, facts: dict[str, Any]) -> None:
    """On Hopper one matrix instruction, but for its columns; elsewhere each chip's own."""
    if facts["arch"] == 90:
        assert facts["instructions"], name
        assert all(shape.startswith("m64n") for shape in facts["instructions"]), name
        assert all(shape.endswith("k16") for shape in facts["instructions"]), name
        assert not facts["mma"], name
        # Triton 3.6 does not wait for a sum that a branch reads, here at the end of a part, if the
        # weights are in registers. The assembler then waits after each instruction.
        early = facts["triton"].startswith("3.6.") and "apart False" in name
        assert facts["serialized"] == (early and "stored plain" not in name), name
    else:
        assert facts["mma" if facts["arch"] == 80 else "tcgen05"], name


def check_adapters(name: str, facts: dict[str, Any]) -> None:
    """One instruction for any number of rows: 16 ranks are too few for those of warp groups."""
    warp_groups = name.startswith("expand") and facts["arch"] > 80
    assert all(shape.startswith("m64n") for shape in facts["instructions"]), name
    assert bool(facts["instructions"]) == (warp_groups and facts["arch"] == 90), name
    assert bool(facts["tcgen05"]) == (warp_groups and facts["arch"] == 100), name
    assert bool(facts["mma"]) != warp_groups, name


def check_loops(name: str, facts: dict[str, Any]) -> None:
    """A loop of n stages waits for the copies of its own step and leaves n - 2 steps in flight.

    Attention once waited for everything: the block table was read in its loop. Products did at each
    of their parts, which were loops within a loop. Copies move 16 bytes, or the same loop needs
    eight times as many instructions.
    """
    assert facts["stages"] >= 2, name
    steps = facts["stages"] - 2
    # Scales of blocks are copied too, if a thread has 4 bytes of them at least.
    expected = [{3 * steps}, {2 * steps}] if "stored blocks" in name else [{2 * steps}]
    assert set(facts["waits"]) in expected, name
    if "stored float8" in name or "stored blocks" in name:
        # Weights become bfloat16 in registers, which halves their copies; scales have few bytes.
        assert set(facts["copies"]) <= {"0x10", "0x8", "0x4"}, name
        assert not facts["flushed"], name  # the least in float8 are below what float32 flushes
    else:
        assert facts["copies"] == ["0x10"], name
    if name.startswith(("product", "head")):
        assert facts["loops"] <= 1, name
