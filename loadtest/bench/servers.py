"""Server processes under test: start, readiness, CPU and memory, stop.

Each runs on a free port of 127.0.0.1 as a process of its own; its output goes to a log file. The
table of servers is in `peers`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from service.bench.client import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The load that a server is started for."""

    model: Path  # GGUF
    threads: int
    clients: int  # concurrent
    context: int  # maximum tokens of a request, prompt and output
    folder: Path  # logs and converted weights
    quire_flags: Sequence[str] = ()
    variant: str = ""  # instruction set that all servers are restricted to; empty: the best one

    @property
    def variables(self) -> dict[str, str]:
        """Environment that restricts oneDNN (OpenVINO, torch) and torch's own loops."""
        name = self.variant.upper()
        return {"ONEDNN_MAX_CPU_ISA": name, "ATEN_CPU_CAPABILITY": name.lower()} if name else {}


Command = Callable[[Plan, int], list[str]]
"""Plan, port -> command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """How to start a server and what its requests need."""

    name: str
    command: Command
    quality: Callable[[Plan], list[str]] | None = None  # command that prints the perplexity
    weight_bytes: float = 1.0  # of a weight of the layers, blocks' scales included
    variants: Sequence[str] = ()  # that it can be restricted to
    modules: Sequence[str] = ()  # Python modules that it needs
    programs: Sequence[str] = ()  # executables that it needs
    health: str = "/health"
    fields: Callable[[Plan], Mapping[str, object]] = lambda _: {}  # of the body of a prompt
    chat_fields: Callable[[Plan], Mapping[str, object]] = lambda _: {}  # of a question
    variables: Mapping[str, str] = field(default_factory=dict)  # environment
    sends_done: bool = True
    conversion: Callable[[Plan], list[str]] | None = None  # command to convert the weights
    tries_threads: bool = False  # its number of threads has to be tuned
    once: bool = False  # measured in the first repeat only, without arrivals: a slower variant
    start_timeout: float = 120.0  # seconds

    @property
    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        gone = [name for name in self.modules if importlib.util.find_spec(name) is None]
        gone += [name for name in self.programs if find_program(name) is None]
        return f"{' and '.join(gone)} not installed" if gone else None


def find_program(name: str) -> str | None:
    """In the folder of this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


class ServerFailed(Exception):
    """The server did not start or ended early; the message names its log."""


@dataclass(slots=True)
class Running:
    """A server that is ready. CPU and memory are those of its process tree."""

    target: Target
    process: psutil.Process
    start_seconds: float
    rss_peak: int = 0  # bytes, maximum of the samples
    _tree: list[psutil.Process] = field(default_factory=list)

    def find_processes(self) -> None:
        """Called after the warm-up, when all processes have started."""
        with _alive():
            self._tree = [self.process, *self.process.children(recursive=True)]

    def sample_rss(self) -> None:
        """Shared pages count once per process."""
        with _alive():
            now = sum(part.memory_info().rss for part in self._tree)
        self.rss_peak = max(self.rss_peak, now)

    def cpu_seconds(self) -> float:
        """Of all processes that it has or had, those that started after the warm-up included."""
        with _alive():
            total = _cpu_seconds(self.process)
            children = self.process.children(recursive=True)
        for child in children:
            with suppress(psutil.NoSuchProcess):  # its parent has its time by now
                total += _cpu_seconds(child)
        return total


@contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except psutil.Error as error:
        raise ServerFailed(f"ended unexpectedly: {error}, see its log") from error


def _cpu_seconds(process: psutil.Process) -> float:
    """Of a process and those of its children that have ended."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def perplexity(server: Server, plan: Plan) -> float:
    """Of the server's weights and arithmetic; NaN if it cannot be measured. Raises ServerFailed."""
    if server.quality is None:
        return math.nan
    log = plan.folder / f"{server.name}.log"
    command, environment = server.quality(plan), os.environ | plan.variables
    with log.open("ab") as errors:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, check=False
        )
    if done.returncode:
        raise ServerFailed(f"cannot measure its perplexity, see {log}")
    return float(done.stdout.split()[-1])


def convert(server: Server, plan: Plan) -> None:
    """Converts the weights if the server needs that. Raises ServerFailed."""
    if server.conversion is None:
        return
    log = plan.folder / f"{server.name}.log"
    with log.open("ab") as output:
        done = subprocess.run(
            server.conversion(plan), stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise ServerFailed(f"cannot convert the weights of {plan.model.name}, see {log}")


@contextmanager
def running(server: Server, plan: Plan) -> Iterator[Running]:
    """Starts the server, waits until it is healthy, and stops it. Raises ServerFailed."""
    port = free_port()
    log = plan.folder / f"{server.name}.log"
    started = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            server.command(plan, port),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | plan.variables | dict(server.variables),
        )
    try:
        url = f"http://127.0.0.1:{port}{server.health}"
        wait_until_healthy(url, process, timeout=server.start_timeout, log=log)
        target = Target(
            port=port,
            fields=server.fields(plan),
            chat_fields=server.chat_fields(plan),
            sends_done=server.sends_done,
        )
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
    """Waits for status 200. Raises ServerFailed."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"exited with {process.returncode} before it was ready, see {log}")
        try:
            with urlopen(url, timeout=5) as answer:  # noqa: S310 - http on the loopback
                if answer.status == 200:
                    return
        except (URLError, TimeoutError, ConnectionError):
            pass
        time.sleep(0.05)
    raise ServerFailed(f"not ready within {timeout:g} s, see {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, SIGKILL after ten seconds; then SIGKILL to remaining children."""
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
