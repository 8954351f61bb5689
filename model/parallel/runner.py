"""The ranks of tensor parallelism in step: a leader that is a runner, and those who follow it.

    leader (rank 0)     tells each follower what it is about to do, then does it
    follower            does what it hears, in that order, until it hears the end

Words go from host to host and not through the devices' sums: a follower that waits for one costs
nothing and for as long as there is nothing to do, and steps are launched ahead in all ranks alike.
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


class RankLost(Exception):
    """A rank ended. What the others compute is nonsense from then on."""


class Followers(Protocol):
    """The other ranks, as the leader sees them."""

    def tell(self, message: bytes) -> None:
        """Sends a message to each of them. Raises RankLost."""
        ...

    def check(self, *, patience: float = 0.0) -> None:
        """Raises RankLost where one of them ended, or does within `patience` seconds."""
        ...

    def dismiss(self, message: bytes) -> None:
        """Sends a last message, after which they end."""
        ...

    def close(self) -> None:
        """Leaves the group and waits until they have ended."""
        ...


class _Word(IntEnum):
    """What the leader says; the first byte of a message."""

    RUN = 1
    LAUNCH = 2
    COLLECT = 3
    WARM_UP = 4
    CLOSE = 5


class ParallelRunner:
    """The leader: a runner that lets the followers do what it does."""

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
        self.num_blocks = _least(local.num_blocks, group)
        self.exact = False
        self.numeric_class = f"{local.numeric_class}-tp{group.size()}-inexact"
        self._local = local
        self._followers = followers

    def run(self, batch: Batch) -> StepOutput:
        """Computes the step on all ranks. Raises RankLost."""
        self._say(_Word.RUN, encode(batch, None))
        with self._all_there():
            return self._local.run(batch)

    def warm_up(self) -> None:
        """Warms all ranks up."""
        self._say(_Word.WARM_UP)
        with self._all_there():
            self._local.warm_up()

    def close(self) -> None:
        """Ends all ranks."""
        self._followers.dismiss(bytes([_Word.CLOSE]))
        self._local.close()
        self._followers.close()

    def _say(self, word: _Word, body: bytes = b"") -> None:
        self._followers.tell(bytes([word]) + body)

    @contextmanager
    def _all_there(self) -> Iterator[None]:
        """Raises RankLost instead of what came of it, be it an error or a result."""
        try:
            yield
        except RuntimeError:
            self._followers.check(patience=2.0)
            raise
        self._followers.check()  # a sum that was broken off looks like any other


class OverlappedParallelRunner(ParallelRunner):
    """The leader of ranks whose steps can be launched ahead."""

    def __init__(
        self,
        local: OverlappedRunner,
        group: dist.ProcessGroup,
        *,
        config: ModelConfig,
        followers: Followers,
    ) -> None:
        super().__init__(local, group, config=config, followers=followers)
        self._ahead = local

    def run(self, batch: Batch) -> StepOutput:
        """Computes the step on all ranks. Raises RankLost."""
        return self.collect(self.launch(batch))

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        """Starts the step on all ranks; see `OverlappedRunner`. Raises RankLost."""
        self._say(_Word.LAUNCH, encode(batch, unread_T))
        with self._all_there():
            return self._ahead.launch(batch, unread_T=unread_T)

    def collect(self, handle: StepHandle) -> StepOutput:
        """Waits for the oldest step under way. Raises RankLost."""
        self._say(_Word.COLLECT)
        with self._all_there():
            return self._ahead.collect(handle)


def lead(
    local: Runner, group: dist.ProcessGroup, *, config: ModelConfig, followers: Followers
) -> ParallelRunner:
    """The leader of ranks like `local`, which is its own; `config` is the whole network's."""
    ahead = overlapped(local)
    if ahead is None:
        return ParallelRunner(local, group, config=config, followers=followers)
    return OverlappedParallelRunner(ahead, group, config=config, followers=followers)


def follow(local: Runner, group: dist.ProcessGroup, *, hear: Callable[[], bytes]) -> None:
    """A follower's life: does what the leader does until it closes. `hear` waits for a message."""
    _least(local.num_blocks, group)
    ahead = overlapped(local)
    handles: list[StepHandle] = []
    while True:
        message = hear()
        word = _Word(message[0])
        if word is _Word.RUN:
            local.run(decode(message[1:])[0])
        elif word is _Word.LAUNCH and ahead is not None:
            batch, unread_T = decode(message[1:])
            handles.append(ahead.launch(batch, unread_T=unread_T))
        elif word is _Word.COLLECT and ahead is not None:
            ahead.collect(handles.pop(0))
        elif word is _Word.WARM_UP:
            local.warm_up()
        elif word is _Word.CLOSE:
            local.close()
            return
        else:
            raise ValueError(f"{word.name.lower()}: steps of this runner are not launched ahead")


def _least(count: int, group: dist.ProcessGroup) -> int:
    """The smallest pool of all ranks."""
    nccl = dist.get_backend(group) == "nccl"
    least = torch.tensor(count, device="cuda" if nccl else "cpu")
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return int(least)
