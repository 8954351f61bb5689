"""Weights: what a checkpoint holds, by canonical name, and what every runner is built from.

NumPy has no bfloat16: an array of it is an array of `BFLOAT16`, a record of its 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from model.batch import Floats

if TYPE_CHECKING:
    import torch

Weights = Mapping[str, "torch.Tensor"]
"""Canonical name (see `model.families`) -> tensor, fused, on the host, dtype as stored."""

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
"""The same as NumPy arrays, which need no torch."""

BFLOAT16 = np.dtype([("bfloat16", "<u2")])


def float_copy(values: Array | torch.Tensor) -> Floats:
    """A copy in float32 that may be written to."""
    array: Array = values if isinstance(values, np.ndarray) else values.float().numpy()
    if array.dtype == BFLOAT16:
        wide: Floats = (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)
        return wide
    return np.array(array, np.float32, order="C")


def to_tensor(array: Array, dtype: torch.dtype | str | None = None) -> torch.Tensor:
    """A tensor in memory of its own. dtype: torch's or its name; None: the array's.

    Bytes stay bytes: they are blocks of quantised weights.
    """
    import torch

    array = array if array.flags.writeable else array.copy()
    if array.dtype == BFLOAT16:
        tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return tensor if wanted is None or tensor.dtype is torch.uint8 else tensor.to(wanted)
