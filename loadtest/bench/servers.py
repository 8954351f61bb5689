"""A server under comparison: how it is started, when it is ready, what it costs, how it is ended.

Each runs on a free port of 127.0.0.1 in a process of its own, and is ended by its process id. Its
output goes to a log file. Which servers there are says `peers`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from loadtest.client import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a server is started for."""

    model: Path  # GGUF
    threads: int
    clients: int  # the most at a time
    context: int  # tokens a request holds at its end
    folder: Path  # logs and converted weights
    quire_flags: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One way to serve the model."""

    name: str
    command: Callable[[Plan, int], list[str]]  # of the plan and the port
    modules: Sequence[str] = ()  # of Python, without which it cannot start
    programs: Sequence[str] = ()  # on the path
    health: str = "/health"
    fields: Callable[[Plan], Mapping[str, object]] = lambda _: {}  # of a request's body
    variables: Mapping[str, str] = field(default_factory=dict)  # of its environment
    sends_done: bool = True
    conversion: Callable[[Plan], list[str]] | None = None  # a command to be run before the first
    tries_threads: bool = False  # whether its speed hangs on a number of threads that we choose
    once: bool = (
        False  # in the first repeat alone and without arrivals: not the fastest of its kind
    )
    start_timeout: float = 120.0  # seconds

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        gone = [name for name in self.modules if importlib.util.find_spec(name) is None]
        gone += [name for name in self.programs if find_program(name) is None]
        return f"{' and '.join(gone)} not installed" if gone else None


def find_program(name: str) -> str | None:
    """Beside this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


class ServerFailed(Exception):
    """The server did not come up, or did not stay up; the message says where its log is."""


@dataclass(slots=True)
class Running:
    """A server that answers. `cpu_seconds` and `rss` are of its whole process tree."""

    target: Target
    process: psutil.Process
    start_seconds: float
    rss_peak: int = 0  # bytes, of the moments it was sampled at
    _tree: list[psutil.Process] = field(default_factory=list)

    def look_at_tree(self) -> None:
        """Finds the processes; once they are warm there come no more."""
        with _alive():
            self._tree = [self.process, *self.process.children(recursive=True)]

    def sample_rss(self) -> None:
        """Pages that processes share count once for each."""
        with _alive():
            now = sum(part.memory_info().rss for part in self._tree)
        self.rss_peak = max(self.rss_peak, now)

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        with _alive():
            times = [part.cpu_times() for part in self._tree]
        return sum(part.user + part.system for part in times)


@contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except psutil.Error as error:
        raise ServerFailed(f"ended unasked: {error}, see its log") from error


def convert(server: Server, plan: Plan) -> None:
    """Makes the weights that the server reads, where it needs its own. Raises ServerFailed."""
    if server.conversion is None:
        return
    log = plan.folder / f"{server.name}.log"
    with log.open("ab") as output:
        done = subprocess.run(
            server.conversion(plan), stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise ServerFailed(f"its weights cannot be made from {plan.model.name}, see {log}")


@contextmanager
def running(server: Server, plan: Plan) -> Iterator[Running]:
    """Starts the server, waits until it is healthy, and ends it. Raises ServerFailed."""
    port = free_port()
    log = plan.folder / f"{server.name}.log"
    started = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            server.command(plan, port),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(server.variables),
        )
    try:
        url = f"http://127.0.0.1:{port}{server.health}"
        wait_until_healthy(url, process, timeout=server.start_timeout, log=log)
        target = Target(port=port, fields=server.fields(plan), sends_done=server.sends_done)
        yield Running(
            target=target,
            process=psutil.Process(process.pid),
            start_seconds=time.monotonic() - started,
        )
    finally:
        _end(process)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], *, timeout: float, log: Path
) -> None:
    """Until the URL answers with 200. Raises ServerFailed."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"ended with {process.returncode} before it was ready, see {log}")
        try:
            with urlopen(url, timeout=5) as answer:  # noqa: S310 - http on the loopback
                if answer.status == 200:
                    return
        except (URLError, TimeoutError, ConnectionError):
            pass
        time.sleep(0.05)
    raise ServerFailed(f"not ready within {timeout:g} s, see {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL after ten seconds; then what it left behind."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        if child.is_running():
            child.kill()
