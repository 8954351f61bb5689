"""Tensor parallelism: what each of N processes holds and computes, and how they connect and sum.

    rank r holds    heads     H / N query heads and K / N key heads: rows of QKV, columns of out
                    width     F / N of the MLP: rows of gate and up, columns of down
                    whole     embedding, norms, head

A sublayer's last product gives each rank a summand; `reduce` adds them up (Shoeybi et al., arXiv
1909.08053). All ranks then have the same logits and sample the same tokens. NCCL and Gloo choose
the order of the sums, so answers equal those of one process within rounding, not bit by bit.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from model.config import ModelConfig

HOST = "127.0.0.1"  # where ranks connect: other machines cannot

_ROWS = ("attention.qkv", "mlp.gate_up", "mlp.up")
_COLUMNS = ("attention.out", "mlp.down")


def connect(
    *,
    rank: int,
    num_ranks: int,
    port: int,
    device: torch.device,
    timeout: float = 600.0,
    listener: socket.socket | None = None,
) -> dist.ProcessGroup:
    """Connects to the other ranks of this host; returns when all are connected.

    Rank 0 listens at `port`, perhaps with a given `listener`. Ranks wait at most `timeout` seconds
    for one another, here and in each sum.
    """
    limit = timedelta(seconds=timeout)
    listening = None
    if rank == 0:
        listening = (listener or socket.create_server((HOST, port))).detach()
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, and missing in its types
        HOST,
        port,
        num_ranks,
        is_master=rank == 0,
        timeout=limit,
        wait_for_workers=False,
        master_listen_fd=listening,
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=limit,
    )
    group = dist.group.WORLD
    if group is None:
        raise ValueError("the process group was not made")
    return group


def share_config(config: ModelConfig, *, num_ranks: int) -> ModelConfig:
    """The network that one rank computes. Raises ValueError if it cannot be divided."""
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        size = getattr(config, name)
        if size % num_ranks:
            raise ValueError(f"tensor parallelism over {num_ranks} must divide {name} {size}")
    return replace(
        config,
        num_heads=config.num_heads // num_ranks,
        num_kv_heads=config.num_kv_heads // num_ranks,
        intermediate_size=config.intermediate_size // num_ranks,
    )


def share_tensor(
    name: str, tensor: torch.Tensor, *, config: ModelConfig, rank: int, num_ranks: int
) -> torch.Tensor:
    """A rank's share of one tensor; the rest of it keeps no memory.

    The bias of a sublayer's last product is rank 0's alone, because summands are added up.
    """
    parts = {
        "attention.qkv": [config.query_size, config.kv_size, config.kv_size],
        "mlp.gate_up": [config.intermediate_size, config.intermediate_size],
        "mlp.up": [config.intermediate_size],
    }
    module = name.split(".", 2)[-1].rsplit(".", 1)[0] if name.startswith("blocks.") else ""
    if module in _ROWS:
        pieces = torch.split(tensor, parts[module])
        return torch.cat([piece.chunk(num_ranks)[rank] for piece in pieces])
    if module in _COLUMNS and name.endswith("weight"):
        return tensor.chunk(num_ranks, dim=1)[rank].contiguous()
    if module in _COLUMNS and rank > 0:
        return torch.zeros_like(tensor)
    return tensor


def sum_over(group: dist.ProcessGroup) -> Callable[[torch.Tensor], torch.Tensor]:
    """Adds a tensor up over all ranks, in place."""

    def reduce(summand: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(summand, group=group)
        return summand

    return reduce


class _Summed(nn.Module):
    """A layer whose outputs are summed over the ranks."""

    def __init__(self, layer: nn.Module, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.reduce = reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduce(self.layer(x))


def sum_sublayers(network: nn.Module, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Makes a `Transformer` over a share of the weights sum over the ranks."""
    for path, module in list(network.named_modules()):
        if path.endswith(_COLUMNS):
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, _Summed(module, reduce))
