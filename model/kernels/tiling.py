"""How products are cut into parts of K, and laid out on a chip in tiles.

Parts are bits: their size depends on the shape [N, K] of the weight alone. Tiles are speed: the
layout of a step depends on its rows and on the chip, and changes no bit, since each element of y is
one sum in the same order whatever tile holds it.

Up to 64 rows a step waits for weights, and one tile holds all rows. Beyond, the layout is that of
least estimated time: full waves of programs, or parts in memory if tiles are fewer than
multiprocessors. Legend: M rows, N outputs, K inputs, P parts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from model.kernels.shared_memory import (
    HOPPER,
    MARGIN,
    MULTIPROCESSORS,
    shared_memory,
    stages_within,
)

INPUTS = 128  # K of one tile, the same in every tiling; a part is a whole number of tiles
_MIN_PART = 256  # inputs per part; below, the parts' own traffic outweighs the weights'
_PROGRAMS = 264  # two per multiprocessor of the chips this was sized for; independent of M
_MAX_PARTS = 16

# Nanoseconds and bytes of a Hopper multiprocessor, for comparing layouts: no bit depends on them.
_START = 1500.0  # from the start of a program to its first product
_FETCHED = 60.0  # bytes per nanosecond from the L2 cache
_COMPUTED = 5000.0  # floating-point operations per nanosecond
_STREAMED = 30.0  # bytes per nanosecond and multiprocessor between L2 or memory and all of them


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is laid out on the chip. It affects speed and no bit."""

    rows: int
    outputs: int
    warps: int
    stages: int

    def stages_of(self, x: torch.Tensor) -> int:
        """Stages that fit into the shared memory of the operand's device; fewer for float32."""
        return stages_within(
            shared_memory(x.device), stage=self.stage_bytes(x.element_size()), most=self.stages
        )

    def stage_bytes(self, itemsize: int) -> int:
        return (self.rows + self.outputs) * INPUTS * itemsize

    def fits(self, limit: int) -> bool:
        """Whether all its stages fit into so many bytes of shared memory."""
        return self.stages * self.stage_bytes(2) + MARGIN <= limit

    def tiles(self, num_rows: int, num_outputs: int) -> int:
        return int(triton.cdiv(num_rows, self.rows) * triton.cdiv(num_outputs, self.outputs))

    @property
    def step_time(self) -> float:
        """Nanoseconds of one tile of K: what takes longer, its operands or its products."""
        fetched = self.stage_bytes(2) / _FETCHED
        return max(fetched, 2 * self.rows * self.outputs * INPUTS / _COMPUTED)


class Layout(NamedTuple):
    """A tiling, and whether the parts of K go to memory instead of one program adding them."""

    tiling: Tiling
    is_apart: bool


# Outputs are a multiple of 64: one warp group's instruction.
_FEW_ROWS = (  # for at most so many rows
    (16, Tiling(16, 64, 4, 5)),
    (32, Tiling(32, 64, 4, 4)),
    (64, Tiling(64, 64, 4, 4)),
)
_NARROW = Tiling(64, 64, 4, 4)  # beyond 256 rows it reads weights too often
_NARROW_ROWS = 256
_MIDDLE = Tiling(128, 64, 4, 3)
_WIDE = Tiling(128, 128, 8, 3)
_LESS_SHARED = Tiling(128, 64, 8, 3)  # if three stages of the wide one do not fit


def tiling_for(num_rows: int, *, limit: int = HOPPER) -> Tiling:
    """The tiling of a product of so many outputs that every wave is full: of the head.

    `limit`: bytes of shared memory per program.
    """
    for most, tiling in _FEW_ROWS:
        if num_rows <= most:
            return tiling
    if not _WIDE.fits(limit):
        return _LESS_SHARED
    return _MIDDLE if num_rows <= _MIDDLE.rows else _WIDE


def layout_sizes(most: int) -> list[int]:
    """Numbers of rows up to `most`: the first of each range of rows that has one layout."""
    starts = [1, *(rows + 1 for rows, _ in _FEW_ROWS)]
    starts += range(_NARROW.rows + 1, _NARROW_ROWS, _NARROW.rows)
    starts += range(1, most + 1, _WIDE.rows)
    return sorted({start for start in starts if start <= most})


@functools.cache
def layout_for(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    *,
    limit: int = HOPPER,
    multiprocessors: int = MULTIPROCESSORS,
) -> Layout:
    """The layout of a product on a chip: for more than 64 rows, the one of least estimated time."""
    if num_rows <= _NARROW.rows:
        tiling = tiling_for(num_rows, limit=limit)
        return Layout(tiling, is_apart(num_rows, num_outputs, num_inputs, tiling, multiprocessors))
    return min(
        _layouts(num_rows, num_outputs, num_inputs, limit),
        key=lambda layout: estimated_time(
            layout, num_rows, num_outputs, num_inputs, multiprocessors
        ),
    )


@functools.cache
def tile_for_whole(
    num_rows: int, num_outputs: int, num_inputs: int, *, limit: int, multiprocessors: int
) -> Tiling:
    """The tiling of least estimated time if no part may go to memory."""
    if num_rows <= _NARROW.rows:
        return tiling_for(num_rows, limit=limit)
    layouts = _layouts(num_rows, num_outputs, num_inputs, limit)
    return min(
        (layout for layout in layouts if not layout.is_apart),
        key=lambda layout: estimated_time(
            layout, num_rows, num_outputs, num_inputs, multiprocessors
        ),
    ).tiling


def is_apart(
    num_rows: int, num_outputs: int, num_inputs: int, tiling: Tiling, multiprocessors: int
) -> bool:
    """Whether tiles alone would leave multiprocessors without work."""
    several = part_size(num_outputs, num_inputs) < num_inputs
    return several and tiling.tiles(num_rows, num_outputs) <= multiprocessors


@functools.cache
def part_size(num_outputs: int, num_inputs: int) -> int:
    """Inputs of a part, a function of the weight's shape alone."""
    wanted = triton.cdiv(_PROGRAMS, triton.cdiv(num_outputs, 64))
    parts = max(1, min(wanted, num_inputs // _MIN_PART, _MAX_PARTS))
    return int(triton.cdiv(triton.cdiv(num_inputs, parts), INPUTS) * INPUTS)


def _layouts(num_rows: int, num_outputs: int, num_inputs: int, limit: int) -> Iterator[Layout]:
    """All that a chip can have. The order decides between equals."""
    tilings = [_WIDE, _MIDDLE] if _WIDE.fits(limit) else [_LESS_SHARED]
    if num_rows <= _NARROW_ROWS:
        tilings.append(_NARROW)
    several = part_size(num_outputs, num_inputs) < num_inputs
    for tiling in tilings:
        yield Layout(tiling, is_apart=False)
        if several:
            yield Layout(tiling, is_apart=True)


def estimated_time(
    layout: Layout, num_rows: int, num_outputs: int, num_inputs: int, multiprocessors: int
) -> float:
    """Estimated nanoseconds; the same for all rows that fill the same tiles.

    A program has a multiprocessor to itself, as the stages' shared memory makes it. Parts in memory
    are written once and read once.
    """
    tiling, apart = layout
    part = part_size(num_outputs, num_inputs)
    parts = triton.cdiv(num_inputs, part)
    programs = tiling.tiles(num_rows, num_outputs) * (parts if apart else 1)
    steps = (part if apart else parts * part) // INPUTS
    waves = triton.cdiv(programs, multiprocessors)
    computing = waves * (_START + steps * tiling.step_time)
    stored_rows = triton.cdiv(num_rows, tiling.rows) * tiling.rows
    moved = (2 * 4 * parts if apart else 2 * 2) * stored_rows * num_outputs
    streaming = 2 * num_outputs * num_inputs / (_STREAMED * multiprocessors)
    return float(max(computing, streaming) + moved / (_STREAMED * multiprocessors))
