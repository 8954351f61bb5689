"""Launches that may overlap: a kernel starts while the one before it ends, then waits for it.

    kernel N        ... | computes, stores |
    kernel N + 1            | starts, prefetches weights | waits | computes ...

CUDA's programmatic dependent launch, of sm_90 and newer. A kernel that is launched with
`launch_options` calls `await_inputs` before it reads or writes memory, in each of its programs;
only weights are prefetched. `docs/gpu.md` has why this is enough.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

OVERLAPPED = False  # whether launches overlap: not before a GPU has tried it
_LINES = tl.constexpr(8)  # of 128 bytes, per output: what a pipeline loads first
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def overlaps(device: torch.device) -> bool:
    """Whether launches on this device overlap."""
    return OVERLAPPED and _can_overlap(device)


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """Options of Triton for a kernel that calls `await_inputs` first."""
    overlap = {"launch_pdl": True} if overlaps(device) else {}
    return {"enable_fp_fusion": False, **overlap}


@triton.jit
def await_inputs():
    """Lets the next kernel start, and waits until those before have ended and all they stored is
    visible. Without overlap it does nothing.
    """
    if not _INTERPRETED and tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(
    w_ptr,  # [N, K]
    outputs,
    first,
    inputs,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Brings the first of a program's weights to the L2 cache: of `inputs` from `first` on."""
    LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
    rows = tl.minimum(outputs, N - 1).to(tl.int64)[:, None]
    last = tl.minimum(first + inputs, K) - 1
    places = w_ptr + rows * K + tl.minimum(first + tl.arange(0, _LINES) * LINE, last)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )
