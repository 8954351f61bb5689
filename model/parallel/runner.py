"""The ranks of tensor parallelism in step: a leader that is a runner, and its followers.

    leader (rank 0)     sends each follower the call that it is about to make, then makes it
    follower            makes the calls that it receives, in order, until CLOSE

Commands go from host to host and not through the devices' collectives: a follower waits for one
without cost and without a time limit, and all ranks launch steps ahead alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Protocol

import torch
import torch.distributed as dist

from model.batch import Batch, Bools, StepOutput
from model.config import ModelConfig
from model.parallel.wire import decode, encode
from model.runners import OverlappedRunner, Runner, StepHandle, overlapped


class Followers(Protocol):
    """The other ranks, from the leader's point of view."""

    def send(self, message: bytes) -> None:
        """Sends a message to each of them. Raises RankLost."""
        ...

    def check(self, *, timeout: float = 0.0) -> None:
        """Raises RankLost if one of them has ended, or ends within `timeout` seconds."""
        ...

    def send_last(self, message: bytes) -> None:
        """Sends a last message, after which they end."""
        ...

    def close(self) -> None:
        """Leaves the group and waits until they have ended."""
        ...


class _Command(IntEnum):
    """The first byte of a message from the leader."""

    RUN = 1
    LAUNCH = 2
    COLLECT = 3
    WARM_UP = 4
    CLOSE = 5


class ParallelRunner:
    """The leader: a runner whose calls the followers repeat. Its methods raise RankLost."""

    def __init__(
        self,
        local: Runner,
        group: dist.ProcessGroup,
        *,
        config: ModelConfig,
        followers: Followers,
    ) -> None:
        self.config = config
        self.block_size = local.block_size
        self.num_blocks = _min_over_ranks(local.num_blocks, group)
        self.exact = False
        self.numeric_class = f"{local.numeric_class}-tp{group.size()}-inexact"
        self._local = local
        self._followers = followers

    def run(self, batch: Batch) -> StepOutput:
        self._send(_Command.RUN, encode(batch, None))
        with self._checking_ranks():
            return self._local.run(batch)

    def warm_up(self) -> None:
        self._send(_Command.WARM_UP)
        with self._checking_ranks():
            self._local.warm_up()

    def close(self) -> None:
        self._followers.send_last(bytes([_Command.CLOSE]))
        self._local.close()
        self._followers.close()

    def _send(self, command: _Command, body: bytes = b"") -> None:
        self._followers.send(bytes([command]) + body)

    @contextmanager
    def _checking_ranks(self) -> Iterator[None]:
        """Raises RankLost in place of an error or a result if a rank has ended."""
        try:
            yield
        except RuntimeError:
            self._followers.check(timeout=2.0)
            raise
        self._followers.check()  # an aborted sum looks like any other


class OverlappedParallelRunner(ParallelRunner):
    """The leader of ranks whose steps can be launched ahead."""

    beside_host = True

    def __init__(
        self,
        local: OverlappedRunner,
        group: dist.ProcessGroup,
        *,
        config: ModelConfig,
        followers: Followers,
    ) -> None:
        super().__init__(local, group, config=config, followers=followers)
        self.most_sampled = local.most_sampled
        self._ahead = local

    def run(self, batch: Batch) -> StepOutput:
        return self.collect(self.launch(batch))

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        """Starts the step on all ranks; see `OverlappedRunner`."""
        self._send(_Command.LAUNCH, encode(batch, unread_T))
        with self._checking_ranks():
            return self._ahead.launch(batch, unread_T=unread_T)

    def collect(self, handle: StepHandle) -> StepOutput:
        self._send(_Command.COLLECT)
        with self._checking_ranks():
            return self._ahead.collect(handle)


def lead(
    local: Runner, group: dist.ProcessGroup, *, config: ModelConfig, followers: Followers
) -> ParallelRunner:
    """The leader, whose own rank is `local`; `config` is that of the whole network."""
    ahead = overlapped(local)
    if ahead is None:
        return ParallelRunner(local, group, config=config, followers=followers)
    return OverlappedParallelRunner(ahead, group, config=config, followers=followers)


def follow(local: Runner, group: dist.ProcessGroup, *, receive: Callable[[], bytes]) -> None:
    """Repeats the leader's calls until it closes. `receive` waits for a message."""
    _min_over_ranks(local.num_blocks, group)
    ahead = overlapped(local)
    handles: list[StepHandle] = []
    while True:
        message = receive()
        command = _Command(message[0])
        if command is _Command.RUN:
            local.run(decode(message[1:])[0])
        elif command is _Command.LAUNCH and ahead is not None:
            batch, unread_T = decode(message[1:])
            handles.append(ahead.launch(batch, unread_T=unread_T))
        elif command is _Command.COLLECT and ahead is not None:
            ahead.collect(handles.pop(0))
        elif command is _Command.WARM_UP:
            local.warm_up()
        elif command is _Command.CLOSE:
            local.close()
            return
        else:
            raise ValueError(f"{command.name.lower()}: steps of this runner are not launched ahead")


def _min_over_ranks(count: int, group: dist.ProcessGroup) -> int:
    nccl = dist.get_backend(group) == "nccl"
    smallest = torch.tensor(count, device="cuda" if nccl else "cpu")
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
    return int(smallest)
