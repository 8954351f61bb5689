"""Tensor parallelism: N processes, each with a share of every layer, answer as one.

    rank r holds    heads     H / N query heads and K / N key heads: rows of QKV, columns of out
                    width     F / N of the MLP: rows of gate and up, columns of down
                    whole     embedding, norms, head

A sublayer's last product gives each rank a summand; `reduce` adds them up (Shoeybi et al., arXiv
1909.08053). All ranks then have the same logits and choose the same tokens.

The leader (rank 0) is the runner that the engine knows; it sends each batch to the followers, who
do the same steps. The order in which ranks are summed is the library's, so answers equal those of
one process within rounding and not bit by bit. It starts no processes: whoever does gives each its
rank, calls `connect`, builds a runner over `share` of the weights and the config, and either
serves with `ParallelRunner` or calls `follow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from datetime import timedelta
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from model.batch import Batch, Bools, SamplingBatch, StepOutput
from model.config import ModelConfig
from model.runners import OverlappedRunner, StepHandle

_DTYPES = (np.int32, np.uint64, np.float32, np.bool_, np.int64, np.uint32)
_ROWS = ("attention.qkv", "mlp.gate_up", "mlp.up")
_COLUMNS = ("attention.out", "mlp.down")


class _Word(IntEnum):
    """What the leader says."""

    LAUNCH = 1
    COLLECT = 2
    WARM_UP = 3
    CLOSE = 4


def connect(
    *, rank: int, num_ranks: int, port: int, device: torch.device, timeout: float = 600.0
) -> dist.ProcessGroup:
    """Meets the other ranks of this host; returns when all are there."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout),
    )
    group = dist.group.WORLD
    if group is None:
        raise ValueError("the process group was not made")
    return group


def share_config(config: ModelConfig, *, num_ranks: int) -> ModelConfig:
    """The network that one rank computes. Raises ValueError where it does not divide."""
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


def share_weights(
    config: ModelConfig, weights: Mapping[str, torch.Tensor], *, rank: int, num_ranks: int
) -> dict[str, torch.Tensor]:
    """A rank's share, under the same names. `config` is the whole network's.

    The bias of a sublayer's last product is rank 0's alone, because summands are added up.
    """
    share_config(config, num_ranks=num_ranks)
    parts = {
        "attention.qkv": [config.query_size, config.kv_size, config.kv_size],
        "mlp.gate_up": [config.intermediate_size, config.intermediate_size],
        "mlp.up": [config.intermediate_size],
    }
    shared = {}
    for name in weights:
        tensor = weights[name]
        module = name.split(".", 2)[-1].rsplit(".", 1)[0] if name.startswith("blocks.") else ""
        if module in _ROWS:
            pieces = torch.split(tensor, parts[module])
            tensor = torch.cat([piece.chunk(num_ranks)[rank] for piece in pieces])
        elif module in _COLUMNS and name.endswith("weight"):
            tensor = tensor.chunk(num_ranks, dim=1)[rank].contiguous()
        elif module in _COLUMNS and rank > 0:
            tensor = torch.zeros_like(tensor)
        shared[name] = tensor
    return shared


def sum_over(group: dist.ProcessGroup) -> Callable[[torch.Tensor], torch.Tensor]:
    """Adds a tensor up over all ranks, in place."""

    def reduce(summand: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(summand, group=group)
        return summand

    return reduce


class _Summed(nn.Module):
    """A layer whose outputs are added up over the ranks."""

    def __init__(self, layer: nn.Module, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.reduce = reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduce(self.layer(x))


def sum_sublayers(network: nn.Module, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Makes a `Transformer` over a share of the weights compute with the other ranks."""
    for path, module in list(network.named_modules()):
        if path.endswith(_COLUMNS):
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, _Summed(module, reduce))


class ParallelRunner:
    """The leader: a runner that lets the followers do what it does."""

    def __init__(
        self, local: OverlappedRunner, group: dist.ProcessGroup, *, config: ModelConfig
    ) -> None:
        self.config = config
        self.block_size = local.block_size
        self.num_blocks = _least(local.num_blocks, group)
        self.exact = False
        self.numeric_class = f"{local.numeric_class}-tp{group.size()}-inexact"
        self._local = local
        self._group = group

    def run(self, batch: Batch) -> StepOutput:
        """Computes the step on all ranks."""
        return self.collect(self.launch(batch))

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        """Starts the step on all ranks; see `OverlappedRunner`."""
        _say(self._group, _Word.LAUNCH, encode(batch, unread_T))
        return self._local.launch(batch, unread_T=unread_T)

    def collect(self, handle: StepHandle) -> StepOutput:
        """Waits for the oldest step under way."""
        _say(self._group, _Word.COLLECT)
        return self._local.collect(handle)

    def warm_up(self) -> None:
        """Warms all ranks up."""
        _say(self._group, _Word.WARM_UP)
        self._local.warm_up()

    def close(self) -> None:
        """Ends the followers' loops."""
        _say(self._group, _Word.CLOSE)
        self._local.close()


def follow(local: OverlappedRunner, group: dist.ProcessGroup) -> None:
    """A follower's life: does what the leader does until it closes."""
    _least(local.num_blocks, group)
    handles: list[StepHandle] = []
    while True:
        word, body = _hear(group)
        if word is _Word.LAUNCH:
            batch, unread_T = decode(body)
            handles.append(local.launch(batch, unread_T=unread_T))
        elif word is _Word.COLLECT:
            local.collect(handles.pop(0))
        elif word is _Word.WARM_UP:
            local.warm_up()
        else:
            local.close()
            return


def encode(batch: Batch, unread_T: Bools | None) -> bytes:
    """Arrays end to end: dtype, rank and shape of each, then its bytes."""
    unread = np.zeros(0, np.bool_) if unread_T is None else unread_T
    pieces = []
    for array in (*_arrays(batch), unread):
        kind = _DTYPES.index(array.dtype.type)
        pieces += [np.array([kind, array.ndim, *array.shape], np.int64).tobytes(), array.tobytes()]
    return b"".join(pieces)


def decode(body: bytes) -> tuple[Batch, Bools | None]:
    """What `encode` wrote."""
    arrays = _read_arrays(body)
    fields_of_batch = _fill(Batch, arrays)
    unread = next(arrays)
    return Batch(**fields_of_batch), unread if unread.size else None


def _arrays(record: Batch | SamplingBatch) -> Iterator[np.ndarray[Any, Any]]:
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, SamplingBatch):
            yield from _arrays(value)
        elif isinstance(value, np.ndarray):
            yield np.ascontiguousarray(value)
        else:
            yield np.array(value, np.int64)


def _fill(
    kind: type[Batch | SamplingBatch], arrays: Iterator[np.ndarray[Any, Any]]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.name == "sampling":
            values[field.name] = SamplingBatch(**_fill(SamplingBatch, arrays))
        else:
            array = next(arrays)
            values[field.name] = array if array.ndim else int(array)
    return values


def _read_arrays(body: bytes) -> Iterator[np.ndarray[Any, Any]]:
    at = 0
    while at < len(body):
        kind, rank = np.frombuffer(body, np.int64, 2, at).tolist()
        shape = np.frombuffer(body, np.int64, rank, at + 16).tolist()
        at += 8 * (2 + rank)
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(body, _DTYPES[kind], count, at).reshape(shape)
        at += array.nbytes
        yield array


def _say(group: dist.ProcessGroup, word: _Word, body: bytes = b"") -> None:
    device = _device(group)
    dist.broadcast(torch.tensor([word, len(body)], device=device), 0, group=group)
    if body:
        content = torch.frombuffer(bytearray(body), dtype=torch.uint8).to(device)
        dist.broadcast(content, 0, group=group)


def _hear(group: dist.ProcessGroup) -> tuple[_Word, bytes]:
    device = _device(group)
    head = torch.zeros(2, dtype=torch.int64, device=device)
    dist.broadcast(head, 0, group=group)
    word, size = head.tolist()
    content = torch.zeros(size, dtype=torch.uint8, device=device)
    if size:
        dist.broadcast(content, 0, group=group)
    return _Word(word), content.cpu().numpy().tobytes()


def _least(count: int, group: dist.ProcessGroup) -> int:
    """The smallest pool of all ranks."""
    least = torch.tensor(count, device=_device(group))
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return int(least)


def _device(group: dist.ProcessGroup) -> torch.device:
    nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda" if nccl else "cpu")
