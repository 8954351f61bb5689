"""The processes of tensor parallelism: starts the followers, watches them, ends them.

    leader                                 follower (`follower`, a process each)
    starts them, with an `Order`      ->   reads its share of the checkpoint
    reads its own share               <-   says that it has, or in one line why not
    connect, build the runner         ==   connect, build the runner
    its steps                         ->   `runner.follow`

Leader and follower have a socket between them. When either dies the other reads its end there, at
once and whatever it waits for. Followers have a session of their own and leave signals to the
leader, which may have answers to finish.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from model.checkpoint import LoadedModel, configure, load_model, open_checkpoint
from model.config import ModelConfig
from model.parallel.runner import ParallelRunner, RankLost, lead
from model.parallel.shares import HOST, connect, share_config, share_tensor, sum_over
from model.runners import Runner, RunnerOptions
from model.runners.torch import choose_device

LOADED = b"loaded"
PARTING = 10.0  # seconds that a follower has to end when it was told to
_ROOT = Path(__file__).resolve().parents[2]  # where followers find this package


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a rank is told of its work."""

    path: str
    runner: str
    dtype: str | None  # that the weights are read in; None: as stored
    options: RunnerOptions
    rank: int
    num_ranks: int
    port: int

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(text: bytes) -> Order:
        values = json.loads(text)
        return Order(**values | {"options": RunnerOptions(**values["options"])})


def check_ranks(
    num_ranks: int, *, runner: str, config: ModelConfig, options: RunnerOptions
) -> None:
    """Raises ValueError where this runner, model or machine cannot be shared among so many."""
    if runner not in {"torch", "cuda"}:
        raise ValueError(f"the {runner} runner does no tensor parallelism; torch and cuda do")
    share_config(config, num_ranks=num_ranks)
    device = choose_device(options.device)
    if ":" in options.device:
        raise ValueError("tensor parallelism takes the devices from the first on: name no other")
    if device.type == "cuda" and torch.cuda.device_count() < num_ranks:
        raise ValueError(
            f"tensor parallelism over {num_ranks} needs as many GPUs; there are "
            f"{torch.cuda.device_count()}"
        )


def start_parallel(
    path: Path,
    *,
    runner: str,
    dtype: torch.dtype | None,
    options: RunnerOptions,
    num_ranks: int,
) -> tuple[ParallelRunner, FollowerProcesses]:
    """Loads the model in `num_ranks` processes, of which this one is the first.

    Raises RankLost with one line where another rank cannot, and what the runner raises.
    """
    listener = socket.create_server((HOST, 0))
    order = Order(
        path=str(path.resolve()),
        runner=runner,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        options=_of_a_rank(options, num_ranks),
        rank=0,
        num_ranks=num_ranks,
        port=listener.getsockname()[1],
    )
    with ExitStack() as failed:
        failed.callback(listener.close)
        followers = FollowerProcesses([replace(order, rank=rank) for rank in range(1, num_ranks)])
        failed.callback(followers.end, patience=0.0)
        config, model = read_share(order)
        followers.wait_until_loaded()
        group = connect(
            rank=0, num_ranks=num_ranks, port=order.port, device=device_of(order), listener=listener
        )
        followers.watch(group)
        try:
            local = build_share(order, config, model, group)
            leader = lead(local, group, config=config, followers=followers)
        except RuntimeError:  # maybe a sum that lost a rank
            followers.check(patience=2.0)
            raise
        failed.pop_all()
    return leader, followers


def read_share(order: Order) -> tuple[ModelConfig, LoadedModel]:
    """The whole network's configuration, and the rank's share of its weights."""
    path = Path(order.path)
    _, config = configure(open_checkpoint(path))
    keep = partial(share_tensor, config=config, rank=order.rank, num_ranks=order.num_ranks)
    dtype = None if order.dtype is None else getattr(torch, order.dtype)
    return config, load_model(path, dtype=dtype, keep=keep)


def build_share(
    order: Order, config: ModelConfig, model: LoadedModel, group: dist.ProcessGroup
) -> Runner:
    """The rank's runner, whose sums are those of all ranks."""
    reduce, share = sum_over(group), share_config(config, num_ranks=order.num_ranks)
    options = replace(order.options, device=str(device_of(order)))
    if order.runner == "cuda":
        from model.runners.cuda.build import build_runner

        return build_runner(
            share, model.weights, options=options, digest=model.digest, reduce=reduce
        )
    from model.runners.torch import TorchRunner

    return TorchRunner(share, model.weights, options=options, digest=model.digest, reduce=reduce)


def device_of(order: Order) -> torch.device:
    """Each rank has a GPU of its own, or all share the CPU."""
    device = choose_device(order.options.device)
    return torch.device("cuda", order.rank) if device.type == "cuda" else device


def _of_a_rank(options: RunnerOptions, num_ranks: int) -> RunnerOptions:
    """Ranks on one CPU share its threads."""
    num_threads = options.num_threads or torch.get_num_threads()
    return replace(options, num_threads=max(1, num_threads // num_ranks))


class FollowerProcesses:
    """The followers as the processes they are; see `runner.Followers`."""

    def __init__(self, orders: Sequence[Order]) -> None:
        self._lost = ""
        self._closing = False
        self._changed = threading.Condition()
        self._when_lost: list[Callable[[str], None]] = []
        self._ranks: dict[Connection, tuple[int, subprocess.Popen[bytes]]] = {}
        for order in orders:
            mine, theirs = Pipe()
            with theirs:
                process = subprocess.Popen(  # noqa: S603  # this program, on this machine
                    [sys.executable, "-m", "model.parallel.follower", str(theirs.fileno())],
                    cwd=_ROOT,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            mine.send_bytes(order.to_json())
            self._ranks[mine] = (order.rank, process)

    def wait_until_loaded(self) -> None:
        """Returns when all have read their share. Raises RankLost with what one of them says."""
        waiting = set(self._ranks)
        while waiting:
            for connection in waiting & set(wait(waiting)):
                if (said := self._hear(connection)) != LOADED.decode():
                    raise RankLost(said)
                waiting.remove(connection)

    def watch(self, group: dist.ProcessGroup) -> None:
        """From now on the end of one breaks off the sums of `group` that wait for it."""
        threading.Thread(target=self._watch, args=(group,), name="ranks", daemon=True).start()

    def when_lost(self, callback: Callable[[str], None]) -> None:
        """Calls back, once and from any thread, with a line about the first that ended."""
        with self._changed:
            if not self._lost:
                self._when_lost.append(callback)
                return
        callback(self._lost)

    def tell(self, message: bytes) -> None:
        """Sends a message to each of them. Raises RankLost."""
        try:
            for connection in self._ranks:
                connection.send_bytes(message)
        except OSError:
            self.check(patience=2.0)
            raise

    def check(self, *, patience: float = 0.0) -> None:
        """Raises RankLost where one of them ended, or does within `patience` seconds."""
        if patience:
            with self._changed:
                self._changed.wait_for(lambda: self._lost, patience)
        if self._lost:
            raise RankLost(self._lost)

    def dismiss(self, message: bytes) -> None:
        """Sends a last message: who ends now is not lost."""
        self._closing = True
        with suppress(OSError):
            for connection in self._ranks:
                connection.send_bytes(message)

    def close(self) -> None:
        """Leaves the group and waits until they have ended."""
        if not self._lost:  # else some would wait for the others
            dist.destroy_process_group()
        self.end()

    def end(self, *, patience: float = PARTING) -> None:
        """Waits for them so many seconds each; who has not ended then is killed."""
        self._closing = True
        for _, process in self._ranks.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
            process.kill()
            process.wait()

    def _watch(self, group: dist.ProcessGroup) -> None:
        ready = set(wait(self._ranks))
        if self._closing:
            return
        ended = next(connection for connection in self._ranks if connection in ready)
        with self._changed:
            self._lost = self._hear(ended)
            self._changed.notify_all()
        for callback in self._when_lost:
            callback(self._lost)
        if dist.get_backend(group) == "nccl":  # a kernel that waits for a rank never gives up
            group.abort()

    def _hear(self, connection: Connection) -> str:
        """What a follower says: its last word, where it ended."""
        rank, process = self._ranks[connection]
        try:
            said = connection.recv_bytes()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                process.wait(PARTING)
            return f"rank {rank} of the tensor parallelism ended with status {process.returncode}"
        return said.decode() if said == LOADED else f"rank {rank}: {said.decode()}"
