"""Pinned buffers: how ints travel between host and device while both work.

    Upload      host -> device: one copy per step to one place, whatever the step needs
    TokenRing   device -> host: the sampled tokens of a step, read when they have arrived

A buffer is reused only when the copy that used it last is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, pairwise

import numpy as np
import torch

from model.batch import Ints
from model.runners.cuda.accelerator import Accelerator, PendingCopy


class Upload:
    """Sends arrays of ints, end to end, to the front of `target`, which graphs may read."""

    def __init__(self, accelerator: Accelerator, *, capacity: int, num_buffers: int) -> None:
        self.target = torch.zeros(capacity, dtype=torch.int32, device=accelerator.device)
        self._accelerator = accelerator
        self._buffers = [accelerator.pinned(capacity, torch.int32) for _ in range(num_buffers)]
        self._fences: list[Callable[[], None] | None] = [None] * num_buffers
        self._next = cycle(range(num_buffers))

    def send(self, arrays: Sequence[Ints]) -> list[torch.Tensor]:
        """Returns the arrays on the device, in order; valid until the next `send`."""
        ends = np.cumsum([0, *(len(array) for array in arrays)]).tolist()
        if ends[-1] > len(self.target):
            raise ValueError(f"a step may upload at most {len(self.target)} numbers")
        index = next(self._next)
        fence = self._fences[index]
        if fence is not None:
            fence()
        buffer = self._buffers[index]
        np.concatenate(arrays, out=buffer[: ends[-1]].numpy())
        self.target[: ends[-1]].copy_(buffer[: ends[-1]], non_blocking=True)
        self._fences[index] = self._accelerator.fence()
        return [self.target[start:end] for start, end in pairwise(ends)]


class TokenRing:
    """Reads token ids back. At most `num_buffers` copies are in flight."""

    def __init__(self, accelerator: Accelerator, *, width: int, num_buffers: int) -> None:
        self._accelerator = accelerator
        self._buffers = [accelerator.pinned(width, torch.int32) for _ in range(num_buffers)]
        self._next = cycle(self._buffers)

    def read(self, tokens_R: torch.Tensor) -> PendingCopy:
        """Starts to read; the result is valid until `num_buffers` further reads."""
        return self._accelerator.read_back(tokens_R, next(self._next))
