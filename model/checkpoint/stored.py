"""How a family's checkpoints hold the network's tensors: the inverse of `assemble`. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from model.checkpoint.assemble import fused_parts
from model.config import ModelConfig
from model.families import Family


class Stored(NamedTuple):
    """A tensor as Hugging Face stores it: some rows of one of the network's."""

    name: str
    fused: str  # the network's name
    start: int  # row
    stop: int
    transposed: bool  # stored [in, out]

    @property
    def module(self) -> str:
        """The name without `.weight` or `.bias`."""
        return self.name.rpartition(".")[0]


def stored_tensors(family: Family, config: ModelConfig) -> Iterator[Stored]:
    """The tensors of a model, as its checkpoints name them.

    If a family has several names for a tensor, the last one counts.
    """
    by_first = {}
    for name, covered in family.names.items():
        if covered is not None:
            parts = (covered,) if isinstance(covered, str) else covered
            by_first[parts[0]] = (name, len(parts))
    for fused, shapes in fused_parts(config):
        numbered = re.search(r"\bblocks\.(\d+)\.", fused)
        layer = numbered[1] if numbered else "0"
        rows = [shape[0] for shape in shapes.values()]
        names = [part.replace(f"blocks.{layer}.", "blocks.{i}.", 1) for part in shapes]
        index = start = 0
        while index < len(names):
            pattern, count = by_first[names[index]]
            stop = start + sum(rows[index : index + count])
            transposed = pattern in family.transposed
            yield Stored(pattern.replace("{i}", layer), fused, start, stop, transposed)
            index, start = index + count, stop
