"""Attention backends: a Protocol, and a table from name to implementation.

A backend reads the queries of a step and the paged K and V of their sequences. Every other backend
is tested against `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from model.batch import Batch


class Attention(Protocol):
    """Attention over the paged KV cache, prepared once per step and used by every layer."""

    def prepare(self, batch: Batch, *, block_size: int, device: torch.device) -> None:
        """Builds what all layers of this step share (index tensors, masks)."""
        ...

    def attend(
        self,
        queries_THD: torch.Tensor,
        keys_XKD: torch.Tensor,
        values_XKD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attends each query to its sequence's positions up to its own; returns [T, H, D].

        `keys_XKD` and `values_XKD` are one layer of the pool seen as slots:
        X = num_blocks * block_size, slot = block * block_size + offset. The step's own K and V are
        already stored there.
        """
        ...


def _reference() -> Attention:
    from model.attention.reference import ReferenceAttention

    return ReferenceAttention()


def _torch_paged() -> Attention:
    from model.attention.torch_paged import TorchPagedAttention

    return TorchPagedAttention()


def _triton_paged() -> Attention:
    from model.attention.triton_paged import TritonPagedAttention

    return TritonPagedAttention()


ATTENTION: dict[str, Callable[[], Attention]] = {
    "reference": _reference,
    "torch_paged": _torch_paged,
    "triton_paged": _triton_paged,
}
