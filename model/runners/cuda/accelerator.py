"""Accelerator: the interface between the cuda runner and CUDA.

    pinned memory     lets copies overlap with computation
    read back         device -> host, complete when the call that waits returns
    compile ahead     in parallel, what some work launches
    capture           a sequence of launches, replayed by one: CUDA graphs
    memory            free bytes, and the peak use of some work
    time              that work takes on the device

`HostAccelerator` is the same on a CPU, for tests: captured work is called directly, and what is
read back arrives in that call and not before, so that code that reads too early reads nonsense.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, Protocol

import torch

from model.runners.cuda.compile_ahead import compile_ahead

UNREAD = -(2**31)  # what a host buffer holds until its copy has arrived


PendingCopy = Callable[[], torch.Tensor]
"""Waits for a copy to the host that is in flight; returns the values."""


class Accelerator(Protocol):
    """One device. All work is launched from one thread, in order."""

    device: torch.device

    def activate(self) -> None:
        """Makes it the device of this thread: CUDA's default is the first one in every thread."""
        ...

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """A host buffer for asynchronous copies."""
        ...

    def read_back(self, source: torch.Tensor, buffer: torch.Tensor) -> PendingCopy:
        """Starts to copy `source` to the front of a flat buffer; the result has its shape."""
        ...

    def fence(self) -> Callable[[], None]:
        """Marks this point of the launched work; calling the result waits until it is reached."""
        ...

    def compile_ahead(self, work: Callable[[], None]) -> None:
        """Compiles the kernels that `work` launches. It may run without computing anything."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Captures `work`; returns its replay. It runs once or more during the capture.

        Raises RuntimeError if that fails; the stream of launches is then the same as before.
        """
        ...

    def free_memory(self) -> int | None:
        """Bytes; None if unknown."""
        ...

    def peak_of(self, work: Callable[[], None]) -> int:
        """Bytes that `work` needs on top of what is allocated already."""
        ...


class CudaAccelerator:
    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._pool: Any = None  # graphs share their memory: one runs at a time

    def activate(self) -> None:
        torch.cuda.set_device(self.device)

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def read_back(self, source: torch.Tensor, buffer: torch.Tensor) -> PendingCopy:
        target = buffer[: source.numel()].view(source.shape)
        target.copy_(source, non_blocking=True)
        wait = self.fence()

        def values() -> torch.Tensor:
            wait()
            return target

        return values

    def fence(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def compile_ahead(self, work: Callable[[], None]) -> None:
        compile_ahead(work)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(stream)
        with torch.cuda.stream(side):  # compiles and loads kernels, which a capture must not
            work()
        stream.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                work()
        finally:
            torch.cuda.set_stream(stream)  # which `graph` leaves out if the capture failed
        self._pool = graph.pool()
        return graph.replay

    def free_memory(self) -> int | None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak_of(self, work: Callable[[], None]) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def median_seconds(work: Callable[[], object], *, repeats: int) -> float:
    """The median time of `work` by the GPU's clock, after one call that loads what it needs."""
    work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1000)
    return statistics.median(times)


class HostAccelerator:
    """A CPU in place of a GPU, with the kernels in Triton's interpreter."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def activate(self) -> None:
        pass

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def read_back(self, source: torch.Tensor, buffer: torch.Tensor) -> PendingCopy:
        target = buffer[: source.numel()].view(source.shape)
        target.fill_(UNREAD if target.dtype == torch.int32 else torch.nan)
        values = source.clone()
        return lambda: target.copy_(values)

    def fence(self) -> Callable[[], None]:
        return lambda: None  # the host is never ahead of its own work

    def compile_ahead(self, work: Callable[[], None]) -> None:
        pass  # the interpreter compiles nothing

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def free_memory(self) -> int | None:
        return None

    def peak_of(self, work: Callable[[], None]) -> int:
        work()
        return 0
