"""Which GPUs the cuda runner supports, and its errors of resources, in one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.runtime.errors import OutOfResources

_LEAST = (8, 0)  # compute capability with bfloat16 matrix instructions
_FLOAT8 = (8, 9)  # with conversions from float8


def unsupported_chip(device: torch.device) -> str | None:
    """Why the kernels cannot run on a GPU; None: they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST:
        return None
    name = torch.cuda.get_device_name(device)
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]} and no bfloat16; "
        f"{_LEAST[0]}.{_LEAST[1]} or higher is needed"
    )


def check_kv_dtype(device: torch.device, kv_dtype: torch.dtype) -> None:
    """Raises ValueError if a GPU cannot read such keys and values."""
    if kv_dtype.itemsize == 1 and torch.cuda.get_device_capability(device) < _FLOAT8:
        raise ValueError(
            f"kv_dtype float8 needs compute capability {_FLOAT8[0]}.{_FLOAT8[1]} or higher: use "
            "bfloat16"
        )


@contextmanager
def resource_errors() -> Iterator[None]:
    """Converts exhausted memory or shared memory to ValueError with one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU has too little memory: {_first_line(error)}; lower max_batch_tokens or "
            "max_sequences, or use a smaller model"
        ) from error
    except OutOfResources as error:
        raise ValueError(
            f"the GPU cannot run a kernel of this model: {_first_line(error)}; use the torch runner"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].removesuffix(".")
