"""The ladder: the batch sizes that decode steps are recorded for. Between them, rows are filled up.

1, 2, 4, 8, 16, 24, 32, ... , the most sequences of a step
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from model.runners.cuda.accelerator import Accelerator

_SMALL = (1, 2, 4)
_STEP = 8


def rungs(most: int) -> tuple[int, ...]:
    """The sizes up to `most`, which is one of them."""
    sizes = {size for size in (*_SMALL, *range(_STEP, most, _STEP)) if size < most}
    return (*sorted(sizes), most)


class Ladder:
    """Recorded work by size."""

    def __init__(
        self, accelerator: Accelerator, sizes: tuple[int, ...], work: Callable[[int], None]
    ) -> None:
        self.sizes = sizes
        self._accelerator = accelerator
        self._work = work
        self._recorded: dict[int, Callable[[], None]] = {}

    def size_for(self, count: int) -> int:
        """The smallest rung that holds `count` rows."""
        return self.sizes[bisect_left(self.sizes, count)]

    def has(self, size: int) -> bool:
        """Whether a rung is recorded."""
        return size in self._recorded

    def record(self, size: int) -> None:
        """Records a rung. The work runs meanwhile, so its rows must be nobody's."""
        self._recorded[size] = self._accelerator.record(lambda: self._work(size))

    def run(self, size: int) -> None:
        """Replays a recorded rung."""
        self._recorded[size]()
