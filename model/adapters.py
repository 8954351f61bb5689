"""Low-rank adapters (LoRA, arXiv 2106.09685) that are applied at run time.

An adapter adds scale · B A to matrices of the layers. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from model.batch import Batch, Floats, Ints


@dataclass(frozen=True, slots=True)
class Factors:
    """What is added to a matrix [out, in] of the network: B A; the scale is part of B."""

    a: Floats  # [rank, in]
    b: Floats  # [out, rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter of one model."""

    digest: str
    factors: Mapping[str, Factors]  # by the network's name of the matrix

    @property
    def num_values(self) -> int:
        """Numbers in all its factors."""
        return sum(each.a.size + each.b.size for each in self.factors.values())


def rows_of_adapters(batch: Batch) -> dict[int, Ints]:
    """Number of an adapter, from 1 -> rows of T that it applies to, rising."""
    if not batch.adapters_S.size:
        return {}
    adapters_T = np.repeat(batch.adapters_S, np.diff(batch.query_starts_S1))
    numbers = np.unique(adapters_T).tolist()
    return {n: np.flatnonzero(adapters_T == n).astype(np.int32) for n in numbers if n}
