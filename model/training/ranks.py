"""The processes of data-parallel training: one alone, or those that `torchrun` started."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed.nn.functional  # before there is a group: its defaults would keep it alive
from torch import distributed

from model.runners.torch import choose_device


class Ranks:
    """One process. `join_ranks` gives a process its place among several."""

    def __init__(self, device: torch.device, *, index: int = 0, size: int = 1) -> None:
        self.device = device
        self.index = index
        self.size = size

    @property
    def leads(self) -> bool:
        """Whether this process reports and writes."""
        return self.index == 0

    def copy(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives every process the values of the first one; in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), src=0)

    def sum_all(self, tensors: Iterable[torch.Tensor]) -> None:
        """The sums over all processes, which give as many tensors, in one order; in place."""
        if self.size > 1:
            works = [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in works:
                work.wait()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; in place."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:  # noqa: FBT001 - its only argument
        """Whether it is true in one of the processes."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def close(self) -> None:
        """Leaves the group and ends its threads: a process that ends while one of them drops a
        Python object aborts.
        """
        if distributed.is_initialized():
            distributed.destroy_process_group()


def join_ranks(device: str) -> Ranks:
    """The place of this process among those of `torchrun`, if any. Raises ValueError."""
    if not distributed.is_torchelastic_launched():
        return Ranks(choose_device(device))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", distributed.get_node_local_rank())
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Ranks(chosen, index=distributed.get_rank(), size=distributed.get_world_size())
