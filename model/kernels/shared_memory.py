"""What a chip has: shared memory and multiprocessors. They decide on stages and tiles, no bits."""

from __future__ import annotations

import functools
from typing import Any

import torch

HOPPER = 227 * 1024
MULTIPROCESSORS = 132  # of an H100 or H200
MARGIN = 2048  # bytes that the compiler needs besides the buffers of stages


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes per program: 99 KiB on sm_86, 89 and 120, 163 on sm_80, 227 on sm_90 and 100.

    The interpreter has no limit; it computes what a Hopper GPU does.
    """
    if device.type != "cuda":
        return HOPPER
    properties: Any = torch.cuda.get_device_properties(device)  # its types lack this one
    return int(properties.shared_memory_per_block_optin)


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """Programs that run at a time, if each has a multiprocessor to itself."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def stages_within(limit: int, *, stage: int, fixed: int = 0, most: int) -> int:
    """Stages of a pipeline, from 1 to `most`, each of `stage` bytes beside `fixed` ones."""
    return max(1, min(most, (limit - MARGIN - fixed) // stage))
