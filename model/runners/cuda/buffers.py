"""Rings of pinned buffers: how ints travel between host and device while both work.

    Upload   host -> device: one copy a step into one place, whatever the step needs
    Ring     device -> host: the sampled tokens of a step, read when they have arrived

A buffer is used again only when the copy that used it last is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from model.batch import Ints
from model.runners.cuda.accelerator import Accelerator, Reading


class Upload:
    """Sends arrays of ints, end to end, to the front of `target`, which graphs may read."""

    def __init__(self, accelerator: Accelerator, *, capacity: int, slots: int) -> None:
        self.target = torch.zeros(capacity, dtype=torch.int32, device=accelerator.device)
        self._accelerator = accelerator
        self._buffers = [accelerator.pinned(capacity, torch.int32) for _ in range(slots)]
        self._fences: list[Callable[[], None] | None] = [None] * slots
        self._next = 0

    def send(self, arrays: Sequence[Ints]) -> list[torch.Tensor]:
        """Their places on the device, in order; valid until the next `send`."""
        ends = np.cumsum([0, *(len(array) for array in arrays)]).tolist()
        if ends[-1] > len(self.target):
            raise ValueError(f"a step may upload at most {len(self.target)} numbers")
        slot = self._next
        self._next = (slot + 1) % len(self._buffers)
        fence = self._fences[slot]
        if fence is not None:
            fence()
        buffer = self._buffers[slot]
        np.concatenate(arrays, out=buffer[: ends[-1]].numpy())
        self.target[: ends[-1]].copy_(buffer[: ends[-1]], non_blocking=True)
        self._fences[slot] = self._accelerator.fence()
        return [self.target[start:end] for start, end in pairwise(ends)]


class Ring:
    """Reads token ids back. At most `slots` readings are under way."""

    def __init__(self, accelerator: Accelerator, *, width: int, slots: int) -> None:
        self._accelerator = accelerator
        self._buffers = [accelerator.pinned(width, torch.int32) for _ in range(slots)]
        self._next = 0

    def post(self, tokens_R: torch.Tensor) -> Reading:
        """Starts to read; the result is valid until `slots` further posts."""
        slot = self._next
        self._next = (slot + 1) % len(self._buffers)
        return self._accelerator.read_back(tokens_R, self._buffers[slot])
