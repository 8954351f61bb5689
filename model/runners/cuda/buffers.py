"""Pinned buffers: how ints travel between host and device while both work.

    Upload      host -> device: one copy per step to one place, whatever the step needs
    TokenRing   device -> host: the sampled tokens of a step, read when they have arrived

A buffer is reused only when the copy that used it last is done. Uploaded arrays are aligned:
Triton compiles a kernel once more for an address of another alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, cycle

import torch

from model.batch import Ints
from model.runners.cuda.accelerator import Accelerator, PendingCopy

_ALIGNMENT = 4  # of int32: 16 bytes


class Upload:
    """Sends arrays of ints, one after another, to the front of `target`, which graphs may read."""

    def __init__(
        self, accelerator: Accelerator, *, capacity: int, num_arrays: int, num_buffers: int
    ) -> None:
        """`capacity`: ints of one `send`, in at most `num_arrays` arrays."""
        self._limit = capacity
        capacity += num_arrays * (_ALIGNMENT - 1)
        self.target = torch.zeros(capacity, dtype=torch.int32, device=accelerator.device)
        self._accelerator = accelerator
        self._buffers = [accelerator.pinned(capacity, torch.int32) for _ in range(num_buffers)]
        self._fences: list[Callable[[], None] | None] = [None] * num_buffers
        self._next = cycle(range(num_buffers))

    def send(self, arrays: Sequence[Ints]) -> list[torch.Tensor]:
        """Returns the arrays on the device, in order; valid until the next `send`."""
        lengths = [len(array) for array in arrays]
        if sum(lengths) > self._limit:
            raise ValueError(f"a step may upload at most {self._limit} numbers")
        starts = _starts(lengths)
        index = next(self._next)
        fence = self._fences[index]
        if fence is not None:
            fence()
        buffer = self._buffers[index]
        values = buffer.numpy()
        for start, array in zip(starts, arrays, strict=False):
            values[start : start + len(array)] = array
        self.target[: starts[-1]].copy_(buffer[: starts[-1]], non_blocking=True)
        self._fences[index] = self._accelerator.fence()
        return self.views(lengths)

    def views(self, lengths: Sequence[int]) -> list[torch.Tensor]:
        """Where the first arrays of a `send` are on the device, if they have these lengths."""
        return [
            self.target[start : start + length]
            for start, length in zip(_starts(lengths), lengths, strict=False)
        ]


def _starts(lengths: Sequence[int]) -> list[int]:
    """The places of arrays of these lengths one after another, and the end."""
    padded = [-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths]
    return [0, *accumulate(padded)]


class TokenRing:
    """Reads token ids back. At most `num_buffers` copies are in flight."""

    def __init__(self, accelerator: Accelerator, *, width: int, num_buffers: int) -> None:
        self._accelerator = accelerator
        self._buffers = [accelerator.pinned(width, torch.int32) for _ in range(num_buffers)]
        self._next = cycle(self._buffers)

    def read(self, tokens_R: torch.Tensor) -> PendingCopy:
        """Starts to read; the result is valid until `num_buffers` further reads."""
        return self._accelerator.read_back(tokens_R, next(self._next))
