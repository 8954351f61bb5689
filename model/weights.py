"""Weights: what a checkpoint holds, by canonical name, and what every runner is built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Weights = Mapping[str, "torch.Tensor"]
"""Canonical name (see `model.families`) -> tensor, fused, on the host, dtype as stored."""
