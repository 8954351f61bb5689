"""Every bad input against a server in a process of its own. After each one it is healthy, and a
normal request still gives the reference answer; at the end its log holds no traceback and no input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.api import bad_input_rows as table
from tests.api.bad_input_rows import CANARY, COMPLETIONS, B, C, Row, check_error
from tests.api.raw_http_rows import (
    GOOD,
    LAST,
    LENGTH,
    MUCH,
    Answer,
    answers,
    exchange,
    plain,
    raw_rows,
    request,
)
from tests.cluster.processes import total
from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow

MAX_QUEUED_TOKENS = 1500
JSON = {"content-type": "application/json"}


@dataclass(kw_only=True)
class Server:
    """A process, and a client with connections that it keeps."""

    process: subprocess.Popen[bytes]
    place: tuple[str, int]
    admin_port: int
    log: Path
    vocab_size: int
    client: httpx.Client
    reference: Any = None
    drips: dict[str, tuple[float, list[Answer]]] = field(default_factory=dict)

    def cpu_seconds(self) -> float:
        """What the process used so far: unlike time, it does not depend on the machine's load."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def send(self, row: Row) -> httpx.Response:
        url = f"http://127.0.0.1:{self.place[1]}{row.path}"
        return self.client.request(row.method, url, content=row.content, headers=row.sent_headers)

    def answer(self) -> Any:
        reply = self.client.post(COMPLETIONS, content=GOOD, headers=JSON)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"]

    def check_unharmed(self) -> None:
        assert self.client.get("/health").json()["status"] == "ok"
        assert self.answer() == self.reference

    def gauges(self) -> dict[str, float]:
        text = httpx.get(f"http://127.0.0.1:{self.admin_port}/metrics", timeout=PATIENCE).text
        lines = re.findall(r"^(\w+\S*) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in lines}


@contextmanager
def started(tiny_model: TinyModel, folder: Path) -> Iterator[Server]:
    """`quire serve`. Its log may never hold a traceback or anything that a client sent."""
    log, ports = folder / "log", (free_port(), free_port())
    model = tiny_model.write_folder(folder / "model")
    command = [sys.executable, "-m", "service", "serve", "--model", str(model)]
    command += ["--model-name", table.MODEL, "--port", str(ports[0]), "--log-format", "json"]
    command += ["--admin-port", str(ports[1]), "--max-queued-tokens", str(MAX_QUEUED_TOKENS)]
    command += ["--allowed-hosts", "elsewhere.example"]  # the origin of some rows
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{ports[0]}"
    try:
        wait_until_ready(url, process, log=log)
        with httpx.Client(base_url=url, timeout=2 * PATIENCE) as client:
            server = Server(
                process=process,
                place=("127.0.0.1", ports[0]),
                admin_port=ports[1],
                log=log,
                vocab_size=tiny_model.vocab_size,
                client=client,
            )
            server.reference = server.answer()
            yield server
        check_log(server)
    finally:
        process.kill()
        sys.stdout.write(f"{process.wait()} {log.read_text()[-5000:]}")  # shown with a failure


@pytest.fixture(scope="module")
def server(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two clients drip from the start, and a third sends nothing."""
    with started(tiny_model, tmp_path_factory.mktemp("hostile")) as server:
        threads = [threading.Thread(target=_drip, args=(server, name)) for name in DRIPS]
        for thread in threads:
            thread.start()
        yield server
        for thread in threads:
            thread.join()


def check_log(server: Server) -> None:
    log = server.log.read_text()
    assert "Traceback" not in log
    assert CANARY not in log
    assert "<|im_end|>" not in log
    levels = [json.loads(line)["level"] for line in log.splitlines()]
    assert set(levels) == {"info"}


DRIPS: dict[str, tuple[bytes, bytes]] = {
    "silence": (b"", b""),
    "head": (b"", plain("X: " + "a" * 100)),
    "body": (request("Content-Length: 1000"), b"{" * 1000),
}


def _drip(server: Server, name: str) -> None:
    """A byte in five seconds, until the server ends the connection."""
    began = time.monotonic()
    first, then = DRIPS[name]
    with contextlib.suppress(OSError):
        received = asyncio.run(_dripped(server.place, first, then))
        server.drips[name] = time.monotonic() - began, answers(received)


async def _dripped(place: tuple[str, int], first: bytes, then: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*place)
    writer.write(first)
    said = asyncio.create_task(reader.read())
    for byte in then:
        writer.write(bytes([byte]))
        if (await asyncio.wait([said], timeout=5))[0]:
            break
    try:
        async with asyncio.timeout(2 * PATIENCE):
            return await said
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def test_every_row(server: Server) -> None:
    wrong, costs = [], []
    for row in table.rows(vocab_size=server.vocab_size):
        before = server.cpu_seconds()
        reply = server.send(row)
        costs.append(server.cpu_seconds() - before)
        try:
            check_error(reply, row)
            server.check_unharmed()
        except AssertionError as error:
            wrong.append((str(row), str(error)[:300], reply.text[:200]))
    assert wrong == []
    assert statistics.median(costs) < 0.2  # a refusal is cheap
    assert max(costs) < 5


def test_every_raw_row(server: Server) -> None:
    wrong = []
    for row in raw_rows():
        received: list[Answer] = []
        try:
            received = exchange(server.place, row.sent)
            assert tuple(answer.status for answer in received) == row.statuses
            assert all(answer.headers["x-request-id"].startswith("s0-") for answer in received)
            for answer in received:
                if answer.status >= 400:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            server.check_unharmed()
        except (AssertionError, KeyError, ValueError) as error:
            wrong.append((str(row), repr(error)[:200], [answer.status for answer in received[-3:]]))
    assert wrong == []


def test_odd_requests_are_answered(server: Server) -> None:
    for number, path, body in table.asked(vocab_size=server.vocab_size):
        reply = server.client.post(path, content=json.dumps(body).encode(), headers=JSON)
        assert reply.status_code == 200, (number, reply.text)
        assert len(reply.content) < 200_000
        server.check_unharmed()
    for value in table.IDS:
        headers = {b"content-type": b"application/json", b"x-request-id": value}
        reply = server.client.post(COMPLETIONS, content=GOOD, headers=headers)
        assert reply.headers["x-request-id"].startswith("s0-")
        server.check_unharmed()


def test_bodies_over_the_limit(server: Server) -> None:
    """Refused before the body is read, or as soon as it is too long; also one message of 10 MB."""
    endless = request("Transfer-Encoding: chunked") + (b"10000\r\n" + b" " * 2**16 + b"\r\n") * 80
    for sent in (request("Content-Length: 10000000"), endless):
        (answer,) = exchange(server.place, sent)
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert answer.json()["error"]["code"] == "request_too_large"
        server.check_unharmed()
    row = Row(
        number=67,
        path=table.CHAT,
        body=table.said(role="user", content="x" * 10**7),
        status=413,
        code="request_too_large",
    )
    check_error(server.send(row), row)
    server.check_unharmed()


def test_heads_over_the_limits_cost_no_memory(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    for times in (3, 30):
        before = process.memory_info().rss
        for _ in range(times):
            for sent, status, _code in MUCH.values():
                assert exchange(server.place, sent)[-1].status == status
    assert process.memory_info().rss - before < 40 * 2**20
    server.check_unharmed()


HARD = {"a": "a", "emoji": "😀", "marks": "e\u0301\u0301\u0301", "zwj": "👩\u200d", "space": " "}


@pytest.mark.parametrize("name", HARD)
def test_hard_text(server: Server, name: str) -> None:
    """A megabyte without a place to cut it. Others are served meanwhile: one quiet moment of the
    machine is enough to see it, for a server that is held up is held up each time.
    """
    unit = HARD[name]
    prompt = unit * (10**6 // len(unit.encode()))
    body = json.dumps(B | {"prompt": prompt}, ensure_ascii=False).encode()
    for _ in range(4):
        wait, took = _longest_wait(server, body)
        if wait < max(1.0, took / 2):
            break
    assert wait < max(1.0, took / 2)
    server.check_unharmed()


def _longest_wait(server: Server, body: bytes) -> tuple[float, float]:
    """Seconds that a probe took at most while the body was refused, and the refusal."""
    replies: list[httpx.Response] = []

    def ask() -> None:
        url = f"http://127.0.0.1:{server.place[1]}{COMPLETIONS}"
        replies.append(httpx.post(url, content=body, headers=JSON, timeout=2 * PATIENCE))

    asking = threading.Thread(target=ask)
    asking.start()
    waits, started = [], time.perf_counter()
    while asking.is_alive():
        began = time.perf_counter()
        assert server.client.get("/health/live").status_code == 200
        waits.append(time.perf_counter() - began)
        time.sleep(0.002)
    asking.join()
    took = time.perf_counter() - started
    code = "context_length_exceeded"
    check_error(replies[0], Row(number=32, param="prompt", code=code))
    return max(waits), took


def test_keys_and_streams(server: Server) -> None:
    keyed = JSON | {"idempotency-key": "one"}
    first = server.client.post(COMPLETIONS, content=GOOD, headers=keyed)
    again = server.client.post(COMPLETIONS, content=GOOD, headers=keyed)
    assert first.json() == again.json()
    other = json.dumps(B | {"prompt": "other"}).encode()
    reply = server.client.post(COMPLETIONS, content=other, headers=keyed)
    check_error(reply, Row(number=75, status=409, code="idempotency_key_conflict"))
    assert reply.headers["x-should-retry"] == "false"

    body = json.dumps(B | {"stream": True, "max_tokens": 20}).encode()
    ids = JSON | {"x-quire-event-ids": "1"}
    stream = server.client.post(COMPLETIONS, content=body, headers=ids)
    last = re.findall(r"^id: (\S+)$", stream.text, re.MULTILINE)[-1]
    count, digest = last.split(".")
    path = f"/v1/streams/{stream.headers['x-request-id']}"
    bad = ["abc", "-1", f"{count}.{digest},{count}.{digest}", f"{count}.ABCDEF", "9" * 10_000, "1"]
    for event_id in bad:
        reply = server.client.get(path, headers={"last-event-id": event_id})
        check_error(reply, Row(number=79, param="last-event-id", code="invalid_event_id"))
    turned = f"{int(digest, 16) ^ 1:06x}"
    for event_id in (f"{count}.{turned}", f"{int(count) + 1}.{digest}", f"999999.{digest}"):
        reply = server.client.get(path, headers={"last-event-id": event_id})
        row = Row(number=79, status=409, param="last-event-id", code="stream_divergence")
        check_error(reply, row, kind="server_error")
    server.check_unharmed()


def test_more_than_the_queue_holds(server: Server) -> None:
    body = B | {"prompt": ["hi"] * 4, "n": 16, "max_tokens": 120}
    reply = server.client.post(COMPLETIONS, content=json.dumps(body).encode(), headers=JSON)
    row = Row(number=83, status=503, code="server_is_overloaded")
    check_error(reply, row, kind="service_unavailable_error")
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    server.check_unharmed()


def test_deadlines(server: Server) -> None:
    """While the engine is busy a millisecond is over before the first token."""
    url = f"http://127.0.0.1:{server.place[1]}{COMPLETIONS}"
    busy = B | {"n": 16, "max_tokens": 100, "ignore_eos": True}
    hurried = JSON | {"x-request-timeout-ms": "1"}
    asking = threading.Thread(target=lambda: httpx.post(url, json=busy, timeout=2 * PATIENCE))
    asking.start()
    late = []
    while asking.is_alive():
        reply = server.client.post(COMPLETIONS, content=GOOD, headers=hurried)
        if reply.status_code != 200:
            late.append(reply)
    asking.join()
    assert late
    for reply in late:
        row = Row(number=85, status=504, code="deadline_exceeded")
        check_error(reply, row, kind="server_error")
    server.check_unharmed()


@pytest.mark.parametrize("seed", [1, 2])
async def test_callers_that_leave_at_random(server: Server, seed: int) -> None:
    """Before, in and after their answers, with and without a word; nothing is left of them."""
    draw = random.Random(seed)
    slots = asyncio.Semaphore(32)

    async def call() -> None:
        fields: dict[str, Any] = {
            "stream": draw.random() < 0.7,
            "max_tokens": draw.randrange(1, 100),
            "n": 1 + draw.randrange(3),
            "seed": draw.randrange(1000),
            "ignore_eos": True,
        }
        path, body = draw.choice([(COMPLETIONS, B), (table.CHAT, C)])
        content = json.dumps(body | fields).encode()
        sent = request(
            f"Content-Length: {len(content)}", start=f"POST {path} HTTP/1.1", content=content
        )
        pause, bytes_sent = draw.random() * 0.15, draw.choice([len(sent)] * 5 + [len(sent) // 2])
        async with slots:
            _reader, writer = await asyncio.open_connection(*server.place)
            writer.write(sent[:bytes_sent])
            await asyncio.sleep(pause)
            if draw.random() < 0.5:
                writer.transport.abort()
            writer.close()

    await asyncio.gather(*(call() for _ in range(250)))
    async with asyncio.timeout(PATIENCE):
        while (gauges := server.gauges())["quire_queue_running"] or gauges["quire_queue_requests"]:
            await asyncio.sleep(0.2)
        while total(server.gauges(), "quire_sequences_running"):
            await asyncio.sleep(0.2)
    server.check_unharmed()
    async with asyncio.timeout(PATIENCE):  # the reference answer's own blocks are given back, too
        while total(server.gauges(), "quire_kv_blocks", 'state="used"'):
            await asyncio.sleep(0.2)


def test_bytes_that_drip(server: Server) -> None:
    """Those that the module began with: each was ended."""
    ends = time.monotonic() + 3 * PATIENCE
    while len(server.drips) < len(DRIPS) and time.monotonic() < ends:
        time.sleep(0.1)
    assert {name: [a.status for a in received] for name, (_, received) in server.drips.items()} == {
        "silence": [],
        "head": [408],
        "body": [408],
    }
    assert max(seconds for seconds, _ in server.drips.values()) < 2 * PATIENCE
    server.check_unharmed()


@pytest.fixture
def own_server(tiny_model: TinyModel, tmp_path: Path) -> Iterator[Server]:
    """Not the module's, which other tests may still need: processes share tests in any order."""
    with started(tiny_model, tmp_path) as server:
        yield server


def test_a_server_that_ends(own_server: Server) -> None:
    """Until its port is closed it says 503 and that it ends; then exit code 0, and a clean log."""
    server = own_server
    body = json.dumps(B | {"stream": True, "max_tokens": 120, "ignore_eos": True}).encode()
    refused = []
    with server.client.stream("POST", COMPLETIONS, content=body, headers=JSON) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError):
            while True:
                refused += exchange(server.place, request(LENGTH, LAST, content=GOOD))
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    refused = [answer for answer in refused if answer.status != 200]
    for answer in refused:
        assert (answer.status, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert answer.headers["connection"] == "close"
        assert answer.headers["retry-after"] == "1"
    assert server.process.wait(timeout=PATIENCE) == 0
