"""More idle connections than the process may open files: real processes, real sockets.

Without limits the first port's connections use up every descriptor, and then probes, other clients
and Redis fail with it.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.cluster.redis_process import RedisServer
from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.metrics import metric
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow

DESCRIPTORS = 1024
IDLE = 1400


@dataclass(frozen=True, kw_only=True)
class Server:
    """A process that may open 1,024 files, and cannot raise that limit."""

    api: int
    admin: int
    log: Path

    def metric(self, name: str) -> float:
        return metric(f"http://127.0.0.1:{self.admin}", name)

    def logged(self, text: str) -> int:
        return self.log.read_text().count(text)


@contextlib.contextmanager
def serving(
    folder: Path, model: Path, *arguments: str, descriptors: int = DESCRIPTORS
) -> Iterator[Server]:
    server = Server(api=free_port(), admin=free_port(), log=folder / "log")
    command = [sys.executable, "-m", "service", *arguments, "--model", str(model)]
    command += ["--port", str(server.api), "--admin-port", str(server.admin)]
    limited = ["sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh", *command]
    with server.log.open("wb") as output:
        process = subprocess.Popen(limited, cwd=ROOT, stdout=output, stderr=output)
    try:
        wait_until_ready(f"http://127.0.0.1:{server.api}", process, log=server.log)
        yield server
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module", autouse=True)
def room_for_clients() -> None:
    """This process holds the other ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert hard > 2 * IDLE


@contextlib.contextmanager
def idle_connections(port: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(IDLE):
            connection = socket.create_connection(("127.0.0.1", port), timeout=60)
            opened.append(stack.enter_context(connection))
        yield opened


def probe(port: int, path: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        return int(answer.status)


def check_probes(server: Server) -> None:
    for port in (server.api, server.admin):
        for path in ("/health/startup", "/health/live", "/health/ready"):
            assert probe(port, path) == 200


def test_both_ports_and_other_addresses_are_served(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model.write_folder(tmp_path / "tiny")
    with serving(tmp_path, model, "serve") as server:
        files = server.metric("process_open_fds")
        with idle_connections(server.api):
            check_probes(server)
            other = httpx.HTTPTransport(local_address="127.0.0.2")
            body = {"model": "tiny", "prompt": "the quick", "max_tokens": 4, "ignore_eos": True}
            with httpx.Client(transport=other, timeout=60) as client:
                url = f"http://127.0.0.1:{server.api}/v1/completions"
                answer = client.post(url, json=body)
            assert answer.json()["usage"]["completion_tokens"] == 4, answer.text
            assert server.metric("process_open_fds") < DESCRIPTORS
        closed = 'quire_http_connections_limited_total{outcome="closed",port="%s"}'
        assert server.metric(closed % "api") >= IDLE - DESCRIPTORS
        with idle_connections(server.admin):
            check_probes(server)
        assert server.metric(closed % "admin") >= IDLE - DESCRIPTORS
        assert server.logged("api port: 576 connections are open") == 1
        assert server.logged("admin port: 64 connections are open") == 1
        ends = time.monotonic() + 60
        count = 'quire_http_connections{port="api"}'
        while server.metric(count) > 0 or server.metric("process_open_fds") > files + 8:
            assert time.monotonic() < ends, "connections that ended are counted, or open"
            time.sleep(0.05)


def test_redis_keeps_its_descriptors(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Also if Redis restarts while the idle connections are open, and is connected to again."""
    model = tiny_model.write_folder(tmp_path / "tiny")
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    try:
        with (
            serving(tmp_path, model, "api", "--queue", redis.url) as server,
            idle_connections(server.api),
        ):
            check_probes(server)
            redis.kill()
            redis.start()
            ends = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError):
                    if probe(server.admin, "/health/ready") == 200:
                        break
                assert time.monotonic() < ends, server.log.read_text()
                time.sleep(0.1)
            check_probes(server)
    finally:
        redis.close()


def test_descriptors_above_1023_work(tiny_model: TinyModel, tmp_path: Path) -> None:
    """select() takes none of them. The grammar validator's pipes get such numbers here."""
    model = tiny_model.write_folder(tmp_path / "tiny")
    with (
        serving(tmp_path, model, "serve", descriptors=2 * IDLE) as server,
        idle_connections(server.api),
    ):
        ends = time.monotonic() + PATIENCE
        while server.metric("process_open_fds") <= DESCRIPTORS:  # until it has accepted them
            assert time.monotonic() < ends, "connections are not accepted"
            time.sleep(0.05)
        body = {
            "model": "tiny", "prompt": "the quick", "max_tokens": 4,
            "structured_outputs": {"regex": "[a-z ]+"},
        }  # fmt: skip
        url = f"http://127.0.0.1:{server.api}/v1/completions"
        answer = httpx.post(url, json=body, timeout=60)
        assert answer.status_code == 200, answer.text


def test_a_setting_that_the_system_has_no_descriptors_for_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", "serve", "--max-connections", "1000"]
    run = subprocess.run(
        ["sh", "-c", f'ulimit -n {DESCRIPTORS} && exec "$@"', "sh", *command],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "max_connections: must be at most 768" in run.stderr
    assert "ulimit -n" in run.stderr
