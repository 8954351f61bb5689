"""The processes of tensor parallelism: starts, watches and ends the followers.

    leader                                 follower (`follower`, a process each)
    starts them, with a `RankSpec`    ->   reads its share of the checkpoint
    reads its own share               <-   reports that it has or, in one line, the error
    connect, build the runner         ==   connect, build the runner
    its steps                         ->   `runner.follow`

Leader and follower have a socket between them. When either ends, the other reads end of file at
once, whatever it waits for. Followers have a session of their own and leave signals to the leader,
which may have answers to finish.
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
from model.parallel import RankLost
from model.parallel.runner import ParallelRunner, lead
from model.parallel.shares import HOST, connect, share_config, share_tensor, sum_over
from model.runners import Runner, RunnerOptions
from model.runners.torch import choose_device

LOADED = b"loaded"
EXIT_TIMEOUT = 10.0  # seconds that a follower has to end after CLOSE
_ROOT = Path(__file__).resolve().parents[2]  # where followers find this package


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What a rank is started with."""

    path: str
    runner: str
    dtype: str | None  # of the loaded weights; None: as stored
    options: RunnerOptions
    rank: int
    num_ranks: int
    port: int

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(text: bytes) -> RankSpec:
        values = json.loads(text)
        options = RunnerOptions(**values["options"] | {"adapters": ()})  # see check_ranks
        return RankSpec(**values | {"options": options})


def check_ranks(
    num_ranks: int, *, runner: str, config: ModelConfig, options: RunnerOptions
) -> None:
    """Raises ValueError if the runner, the model or the machine cannot be shared among them."""
    if runner not in {"torch", "cuda"}:
        raise ValueError(
            f"the {runner} runner does not support tensor parallelism; torch and cuda do"
        )
    if options.adapters:
        raise ValueError("tensor parallelism does not apply adapters: serve the merged model")
    share_config(config, num_ranks=num_ranks)
    device = choose_device(options.device)
    if ":" in options.device:
        raise ValueError("tensor parallelism uses the devices from number 0 on: do not name one")
    if device.type == "cuda" and torch.cuda.device_count() < num_ranks:
        raise ValueError(
            f"tensor parallelism over {num_ranks} needs as many GPUs; there are "
            f"{torch.cuda.device_count()}"
        )


def start_parallel(
    path: Path,
    *,
    runner: str,
    dtype: str | None,
    options: RunnerOptions,
    num_ranks: int,
) -> tuple[ParallelRunner, FollowerProcesses]:
    """Loads the model in `num_ranks` processes, of which this one is rank 0.

    Raises RankLost with one line if another rank cannot, and whatever the runner raises.
    """
    listener = socket.create_server((HOST, 0))
    spec = RankSpec(
        path=str(path.resolve()),
        runner=runner,
        dtype=dtype,
        options=_of_a_rank(options, num_ranks),
        rank=0,
        num_ranks=num_ranks,
        port=listener.getsockname()[1],
    )
    with ExitStack() as failed:
        failed.callback(listener.close)
        followers = FollowerProcesses([replace(spec, rank=rank) for rank in range(1, num_ranks)])
        failed.callback(followers.end, timeout=0.0)
        config, model = read_share(spec)
        followers.wait_until_loaded()
        group = connect(
            rank=0, num_ranks=num_ranks, port=spec.port, device=device_of(spec), listener=listener
        )
        followers.watch(group)
        try:
            local = build_share(spec, config, model, group)
            leader = lead(local, group, config=config, followers=followers)
        except RuntimeError:  # perhaps a sum that lost a rank
            followers.check(timeout=2.0)
            raise
        failed.pop_all()
    return leader, followers


def read_share(spec: RankSpec) -> tuple[ModelConfig, LoadedModel]:
    """The whole network's configuration, and the rank's share of its weights."""
    path = Path(spec.path)
    _, config = configure(open_checkpoint(path))
    keep = partial(share_tensor, config=config, rank=spec.rank, num_ranks=spec.num_ranks)
    return config, load_model(path, dtype=spec.dtype, keep=keep)


def build_share(
    spec: RankSpec, config: ModelConfig, model: LoadedModel, group: dist.ProcessGroup
) -> Runner:
    """The rank's runner, which sums over all ranks."""
    reduce, share = sum_over(group), share_config(config, num_ranks=spec.num_ranks)
    options = replace(spec.options, device=str(device_of(spec)))
    if spec.runner == "cuda":
        from model.runners.cuda.build import build_runner

        return build_runner(
            share, model.weights, options=options, digest=model.digest, reduce=reduce
        )
    from model.runners.torch import TorchRunner

    return TorchRunner(share, model.weights, options=options, digest=model.digest, reduce=reduce)


def device_of(spec: RankSpec) -> torch.device:
    """A GPU per rank, or the CPU for all."""
    device = choose_device(spec.options.device)
    return torch.device("cuda", spec.rank) if device.type == "cuda" else device


def _of_a_rank(options: RunnerOptions, num_ranks: int) -> RunnerOptions:
    """Ranks on one CPU share its threads."""
    num_threads = options.num_threads or torch.get_num_threads()
    return replace(options, num_threads=max(1, num_threads // num_ranks))


class FollowerProcesses:
    """The follower processes; see `runner.Followers`."""

    def __init__(self, specs: Sequence[RankSpec]) -> None:
        self._lost = ""
        self._closing = False
        self._changed = threading.Condition()
        self._when_lost: list[Callable[[str], None]] = []
        self._watcher: threading.Thread | None = None
        self._ranks: dict[Connection, tuple[int, subprocess.Popen[bytes]]] = {}
        for spec in specs:
            mine, theirs = Pipe()
            with theirs:
                process = subprocess.Popen(  # noqa: S603  # this program, on this machine
                    [sys.executable, "-m", "model.parallel.follower", str(theirs.fileno())],
                    cwd=_ROOT,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            mine.send_bytes(spec.to_json())
            self._ranks[mine] = (spec.rank, process)

    def wait_until_loaded(self) -> None:
        """Returns when all have read their share. Raises RankLost with a follower's error."""
        waiting = set(self._ranks)
        while waiting:
            for connection in waiting & set(wait(waiting)):
                if (message := self._receive(connection)) != LOADED.decode():
                    raise RankLost(message)
                waiting.remove(connection)

    def watch(self, group: dist.ProcessGroup) -> None:
        """From now on, if one ends, the sums of `group` that wait for it are aborted."""
        self._watcher = threading.Thread(
            target=self._watch, args=(group,), name="ranks", daemon=True
        )
        self._watcher.start()

    def when_lost(self, callback: Callable[[str], None]) -> None:
        """Calls back, once and from any thread, with one line about the first that ended."""
        with self._changed:
            if not self._lost:
                self._when_lost.append(callback)
                return
        callback(self._lost)

    def send(self, message: bytes) -> None:
        try:
            for connection in self._ranks:
                connection.send_bytes(message)
        except OSError:
            self.check(timeout=2.0)
            raise

    def check(self, *, timeout: float = 0.0) -> None:
        if timeout:
            with self._changed:
                self._changed.wait_for(lambda: self._lost, timeout)
        if self._lost:
            raise RankLost(self._lost)

    def send_last(self, message: bytes) -> None:
        """Sends a last message: a follower that ends from now on is not lost."""
        self._closing = True
        with suppress(OSError):
            for connection in self._ranks:
                connection.send_bytes(message)

    def close(self) -> None:
        if not self._lost:  # else some would wait for the others
            dist.destroy_process_group()
        self.end()

    def end(self, *, timeout: float = EXIT_TIMEOUT) -> None:
        """Waits at most `timeout` seconds for each, then kills it."""
        self._closing = True
        for _, process in self._ranks.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            process.kill()
            process.wait()
        if self._watcher is not None:  # it has the group, which must not outlive the interpreter
            self._watcher.join(EXIT_TIMEOUT)

    def _watch(self, group: dist.ProcessGroup) -> None:
        ready = set(wait(self._ranks))
        if self._closing:
            return
        ended = next(connection for connection in self._ranks if connection in ready)
        with self._changed:
            self._lost = self._receive(ended)
            self._changed.notify_all()
        for callback in self._when_lost:
            callback(self._lost)
        if dist.get_backend(group) == "nccl":  # a kernel that waits for a rank never gives up
            group.abort()

    def _receive(self, connection: Connection) -> str:
        """A follower's message; if it has ended, a line with its exit status."""
        rank, process = self._ranks[connection]
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_TIMEOUT)
            return f"rank {rank} of the tensor parallelism ended with status {process.returncode}"
        return message.decode() if message == LOADED else f"rank {rank}: {message.decode()}"
