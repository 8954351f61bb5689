"""How a server stops, as a process: what its clients get, and when it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.http.drain import INTERRUPTED_DRAIN
from tests.cluster.redis_process import RedisServer
from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.metrics import metric
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

BODY = {"model": "tiny", "prompt": "the quick", "max_tokens": 90, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "hi"}]
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/completions": BODY,
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 90,
        "ignore_eos": True,
    },
    "/v1/responses": {"model": "tiny", "input": "hi", "max_output_tokens": 90},
    "/v1/messages": {"model": "tiny", "messages": MESSAGES, "max_tokens": 90},
}


@dataclass(frozen=True)
class Server:
    """`quire serve` at one token per second."""

    url: str
    admin: str
    process: subprocess.Popen[bytes]
    log: Path

    def ended(self, *, within: float) -> None:
        assert self.process.wait(timeout=within) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()


Serve = Callable[..., Server]


@pytest.fixture
def serve(tiny_model: TinyModel, tmp_path: Path) -> Iterator[Serve]:
    folder = tiny_model.write_folder(tmp_path / "tiny")
    started: list[Server] = []

    def start(*flags: str) -> Server:
        ports = [str(free_port()), str(free_port())]
        log = tmp_path / f"log-{len(started)}"
        program = ["tests.support.slow_service", "1", __file__, "serve"]
        command = [sys.executable, "-m", *program, "--model", str(folder)]
        command += ["--runner", "torch", "--dtype", "float32"]
        # With steps of a second, the default would leave no budget for prompts.
        command += ["--target-gap", "60", "--port", ports[0], "--admin-port", ports[1], *flags]
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        url, admin = (f"http://127.0.0.1:{port}" for port in ports)
        started.append(Server(url, admin, process, log))
        wait_until_ready(url, process, log=log)
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


def probe(server: Server, path: str) -> tuple[int, str]:
    reply = httpx.get(f"{server.admin}{path}", timeout=PATIENCE)
    return reply.status_code, reply.json().get("error", {}).get("code", "")


def wait_until_not_ready(server: Server) -> None:
    ends = time.monotonic() + PATIENCE
    while probe(server, "/health/ready") != (503, "shutting_down"):
        assert time.monotonic() < ends, "it stays ready"
        time.sleep(0.02)


def accepts(server: Server) -> bool:
    """Whether a new connection is accepted; its call is refused in any case."""
    try:
        reply = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=PATIENCE)
    except httpx.TransportError:
        return False
    assert reply.status_code == 503, reply.text
    return True


def lines_of(server: Server, path: str, body: dict[str, Any]) -> Iterator[str]:
    with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=2 * PATIENCE) as answer:
        assert answer.status_code == 200
        yield from answer.iter_lines()


def test_sigterm_waits_for_the_answer(serve: Serve) -> None:
    """The admin port answers meanwhile: not ready, alive, measured. New connections are refused."""
    server = serve()
    stream = lines_of(server, "/v1/completions", BODY | {"max_tokens": 6, "stream": True})
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    wait_until_not_ready(server)
    assert probe(server, "/health/live") == (200, "")
    assert httpx.get(f"{server.admin}/metrics", timeout=PATIENCE).status_code == 200
    while accepts(server):  # until the socket is closed, a moment later
        time.sleep(0.02)
    assert "data: [DONE]" in stream
    server.ended(within=PATIENCE)


def test_a_second_signal_ends_it_at_once(serve: Serve) -> None:
    server = serve("--drain-timeout", "600")
    stream = lines_of(server, "/v1/completions", BODY | {"stream": True})
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    wait_until_not_ready(server)
    server.process.send_signal(signal.SIGINT)
    error = error_of(list(stream))
    assert error["code"] == "shutting_down"
    assert "request_id" not in error, "no other process has the answer"
    server.ended(within=PATIENCE)


def test_ctrl_c_does_not_wait_for_a_long_answer(serve: Serve) -> None:
    server = serve("--drain-timeout", "600")
    stream = lines_of(server, "/v1/completions", BODY | {"stream": True})
    next(stream)
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert error_of(list(stream))["code"] == "shutting_down"
    server.ended(within=PATIENCE)
    assert time.monotonic() - began > INTERRUPTED_DRAIN - 1


@pytest.mark.parametrize("queue", ["memory", "redis"])
def test_when_the_time_is_over_every_open_call_gets_an_error(
    serve: Serve, own_redis: RedisServer, queue: str
) -> None:
    """In each dialect, streamed or not; with a shared queue it names the id to read on by."""
    shared = queue == "redis"
    flags = ["--queue", own_redis.url] if shared else []
    server = serve("--drain-timeout", "0.5", *flags)
    with ThreadPoolExecutor(2 * len(DIALECTS)) as pool:
        bodies = [pool.submit(post, server, path, stream=False) for path in DIALECTS]
        streams = [pool.submit(post, server, path, stream=True) for path in DIALECTS]
        ends = time.monotonic() + PATIENCE
        while metric(server.admin, "quire_sequences_running") < 2 * len(DIALECTS):
            assert time.monotonic() < ends, "they do not run"
            assert [call.result().text for call in [*bodies, *streams] if call.done()] == []
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        for call in bodies:
            reply = call.result()
            error = reply.json()["error"]
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert ("last_event_id" in error) is False
            check(error, reply, shared=shared)
        for call in streams:
            reply = call.result()
            assert reply.status_code == 200
            error = error_of(reply.text.split("\n"))
            assert ("last_event_id" in error) is shared
            check(error, reply, shared=shared)
    server.ended(within=PATIENCE)


def check(error: dict[str, Any], reply: httpx.Response, *, shared: bool) -> None:
    call_id = reply.headers["x-request-id"]
    message = str(error["message"])
    assert error.get("request_id") == (call_id if shared else None)
    assert (f"GET /v1/streams/{call_id}" in message) is shared
    assert ("send the request again" in message) is not shared
    assert error["code"] == "shutting_down"


def post(server: Server, path: str, *, stream: bool) -> httpx.Response:
    body = DIALECTS[path] | {"stream": stream}
    return httpx.post(server.url + path, json=body, timeout=2 * PATIENCE)


def error_of(lines: list[str]) -> dict[str, Any]:
    """The error in the last event of a stream."""
    last = [line for line in lines if line.startswith("data: ")][-1]
    error: dict[str, Any] = json.loads(last.removeprefix("data: "))["error"]
    return error
