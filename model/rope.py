"""Scaling of rotary frequencies, of torch tensors and NumPy arrays alike. Torch-free."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from model.config import LinearScaling, RopeScaling

if TYPE_CHECKING:
    import torch

Frequencies = TypeVar("Frequencies", "torch.Tensor", npt.NDArray[np.float64])


def scaled(frequencies: Frequencies, scaling: RopeScaling | LinearScaling) -> Frequencies:
    """The frequencies of a model that was stretched to longer texts.

    Linear scaling slows every pair down by `factor`. In Llama 3's, pairs that turn often within the
    original length keep their frequency, those that turn seldom are slowed down, and those between
    are blended.
    """
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clip(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
