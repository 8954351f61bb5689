"""The processes of data-parallel training: one alone, or those that `torchrun` started."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

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

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the processes."""
        module.to(self.device)
        if self.size == 1:
            return module
        return DistributedDataParallel(module)

    def unsynchronised(self, module: nn.Module, *, skip: bool) -> AbstractContextManager[object]:
        """While open, gradients are only accumulated, if `skip`."""
        if skip and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; in place."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:  # noqa: FBT001 - its only argument
        """Whether it is true in one of the processes."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1:
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
