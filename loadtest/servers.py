"""Servers to compare: how each is started, when it is ready, what it costs, how it is ended.

Each runs on a free port of 127.0.0.1 in a process of its own, and is ended by its process id. Its
output goes to a log file. A peer that is not installed is left out, with the reason.
"""

from __future__ import annotations

import importlib.util
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
    """What every server is started for."""

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
    needs: str  # the module without which it cannot start
    command: Callable[[Plan, int], list[str]]  # of the plan and the port
    health: str = "/health"
    fields: Callable[[Plan], Mapping[str, object]] = lambda _: {}  # of a request's body
    sends_done: bool = True
    prepare: Callable[[Plan], None] | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        found = importlib.util.find_spec(self.needs) is not None
        return None if found else f"{self.needs} is not installed"


class ServerFailed(Exception):
    """The server did not come up; the message says where its log is."""


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
        self._tree = [self.process, *self.process.children(recursive=True)]

    def sample_rss(self) -> None:
        """Pages that processes share count once for each."""
        self.rss_peak = max(self.rss_peak, sum(part.memory_info().rss for part in self._tree))

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        times = [part.cpu_times() for part in self._tree]
        return sum(part.user + part.system for part in times)


@contextmanager
def running(server: Server, plan: Plan, *, timeout: float = 240.0) -> Iterator[Running]:
    """Starts the server, waits until it is healthy, and ends it. Raises ServerFailed."""
    if server.prepare is not None:
        server.prepare(plan)
    port = free_port()
    log = plan.folder / f"{server.name}.log"
    started = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            server.command(plan, port), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}{server.health}", process, timeout, log)
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


def _wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], timeout: float, log: Path
) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"exit code {process.returncode}, see {log}")
        try:
            with urlopen(url, timeout=5) as answer:  # noqa: S310 - http on the loopback
                if answer.status == 200:
                    return
        except (URLError, TimeoutError, ConnectionError):
            pass
        time.sleep(0.05)
    raise ServerFailed(f"not healthy within {timeout:g} s, see {log}")


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


def _quire(plan: Plan, port: int) -> list[str]:
    base = [sys.executable, "-m", "service", "serve", "--model", str(plan.model)]
    base += ["--model-name", _NAME]
    where = ["--host", "127.0.0.1", "--port", str(port), "--admin-port", "0"]
    return [*base, *where, "--threads", str(plan.threads), *plan.quire_flags]


def _llama_cpp(plan: Plan, port: int) -> list[str]:
    base = [sys.executable, "-m", "loadtest.llama_server", "--model", str(plan.model)]
    sizes = ["--parallel", str(plan.clients), "--context", str(plan.context)]
    return [*base, "--port", str(port), "--threads", str(plan.threads), *sizes]


def _folder(plan: Plan) -> Path:
    return plan.folder.resolve() / f"transformers-{plan.model.stem}"


def _prepare_transformers(plan: Plan) -> None:
    command = [sys.executable, "-m", "loadtest.transformers_folder"]
    with (plan.folder / "transformers.log").open("ab") as output:
        subprocess.run(
            [*command, str(plan.model), str(_folder(plan))],
            check=True,
            stderr=output,
            stdout=output,
        )


def _transformers(plan: Plan, port: int) -> list[str]:
    program = str(Path(sys.executable).parent / "transformers")
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    return [program, "serve", str(_folder(plan)), *where, "--continuous-batching"]


_NAME = "compared"  # Quire wants a request to name its model; llama.cpp ignores the name
_WHOLE = {"model": _NAME, "ignore_eos": True, "stream_options": {"include_usage": True}}

SERVERS: Mapping[str, Server] = {
    server.name: server
    for server in (
        Server(
            name="quire",
            needs="service",
            command=_quire,
            health="/health/ready",
            fields=lambda _: _WHOLE,
        ),
        Server(
            name="llama.cpp",
            needs="xllamacpp",
            command=_llama_cpp,
            fields=lambda _: _WHOLE,
        ),
        Server(
            name="transformers",
            needs="transformers",
            command=_transformers,
            fields=lambda plan: {
                "model": str(_folder(plan)),
                "generation_config": '{"do_sample": false}',
            },
            sends_done=False,
            prepare=_prepare_transformers,
        ),
    )
}
