"""Locust's streaming users against a real server, one that dies, and one with wrong responses."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loadtest.load import (
    Load,
    first_model,
    locust_command,
    read_failures,
    read_rows,
    run_locust,
    table,
)
from loadtest.shapes import Shape, users_at
from service.bench.workloads import CALLS, SHARES, Workload, next_turn

TOKENS = 12
TOY = Path(__file__).parent / "toy_server.py"


@pytest.mark.parametrize("shape", list(Shape))
def test_a_shape_has_some_users_until_it_is_over(shape: Shape) -> None:
    for most, seconds in itertools.product((1, 2, 7, 100), (0.5, 10.0, 60.0)):
        counts = [users_at(shape, seconds * i / 97, most=most, seconds=seconds) for i in range(97)]
        assert all(count is not None and 1 <= count <= most for count in counts)
        assert most in counts
        assert users_at(shape, seconds, most=most, seconds=seconds) is None


def test_shapes_differ() -> None:
    def course(shape: Shape) -> list[int | None]:
        return [users_at(shape, second, most=8, seconds=12) for second in range(12)]

    assert course(Shape.STEADY) == [8] * 12
    assert course(Shape.STEP) == [2] * 3 + [4] * 3 + [6] * 3 + [8] * 3
    assert course(Shape.SPIKE) == [2] * 4 + [8] * 4 + [2] * 4


@pytest.mark.parametrize("workload", list(CALLS))
def test_a_call_asks_for_an_exact_number_of_tokens(workload: Workload) -> None:
    call = CALLS[workload](random.Random(1), 40)
    body = call.body("a model")
    assert body["model"] == "a model"
    assert body["max_tokens"] == call.tokens > 0
    assert body["stream"]
    assert body["ignore_eos"]
    assert body["stream_options"] == {"include_usage": True}
    again = CALLS[workload](random.Random(1), 40)
    other = CALLS[workload](random.Random(2), 40)
    assert call == again != other


def test_prefixes_are_shared_and_chats_are_not() -> None:
    rng = random.Random(1)
    prefixes = [CALLS[Workload.PREFIX](rng, 8).fields["messages"] for _ in range(5)]
    chats = [CALLS[Workload.CHAT](rng, 8).fields["messages"] for _ in range(5)]
    assert len({first["content"] for first, _ in prefixes}) == 1
    assert len({last["content"] for _, last in prefixes}) == 5
    assert len({messages[0]["content"] for messages in chats}) == 5


def test_a_mix_has_all_workloads() -> None:
    rng = random.Random(1)
    assert {next_turn(Workload.MIXED, rng) for _ in range(200)} == set(SHARES)
    assert {next_turn(Workload.LONG, rng) for _ in range(5)} == {Workload.LONG}


def run(host: str, out: Path, load: Load, *, model: str) -> int:
    return run_locust(locust_command(host, load, model=model, out=out), log=Path(f"{out}.log"))


@pytest.mark.slow
def test_users_of_a_real_server(
    server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every response is complete, and each token after the first has a gap."""
    monkeypatch.setenv("LOADTEST_KEYS", "one,two")
    model = first_model(server_url, "one,two")
    load = Load(users=4, seconds=5, shape=Shape.STEP, tokens=TOKENS, workload=Workload.CHAT)
    assert run(server_url, tmp_path / "load", load, model=model) == 0
    rows = {(row.kind, row.name): row for row in read_rows(tmp_path / "load")}
    tenants = ("chat tenant 1", "chat tenant 2")
    assert set(rows) == set(itertools.product(("stream", "first token", "gap"), tenants))
    for tenant in tenants:
        streams, firsts, gaps = (rows[kind, tenant] for kind in ("stream", "first token", "gap"))
        assert streams.count == firsts.count > 0
        assert streams.failures == firsts.failures == gaps.failures == 0
        # A token that is a part of a character has no event.
        assert TOKENS / 2 * streams.count < gaps.count <= (TOKENS - 1) * streams.count
        assert 0 < firsts.p50 <= streams.p50
    assert read_failures(tmp_path / "load") == []
    assert "| stream | chat tenant 2 |" in table(list(rows.values()))
    assert "first token" in (tmp_path / "load.html").read_text()


@pytest.mark.slow
def test_a_server_that_is_killed_fails_its_users(tmp_path: Path) -> None:
    """Open streams break, later connections are refused. The server kills itself after its first
    token.
    """
    with subprocess.Popen(
        [sys.executable, str(TOY), "0", "0", "0", "--killed"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        host = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        load = Load(users=4, seconds=5, tokens=400, workload=Workload.CHAT)
        try:
            assert run(host, tmp_path / "load", load, model="any") == 1
        finally:
            server.kill()
    rows = {row.kind: row for row in read_rows(tmp_path / "load")}
    assert rows["stream"].failures == rows["stream"].count >= 4
    assert rows["first token"].count >= 1
    assert rows["first token"].failures == 0
    faults = " ".join(read_failures(tmp_path / "load"))
    assert "ConnectionRefused" in faults
    assert any(
        broken in faults for broken in ("IncompleteRead", "ConnectionReset", "ended without")
    )


def event(**fields: object) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def text(word: str, finish_reason: str | None = None) -> str:
    return event(choices=[{"delta": {"content": word}, "finish_reason": finish_reason}])


USAGE = event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": TOKENS})
DONE = "data: [DONE]\n\n"
WRONG = {
    "HTTP 503": None,
    "11 tokens instead of 12": text("a", "length")
    + USAGE.replace(str(TOKENS), str(TOKENS - 1))
    + DONE,
    "without a finish reason": text("a") + USAGE + DONE,
    "without [DONE]": text("a", "length") + USAGE,
    "error event": text("a") + event(error={"message": "no"}),
    "no text": text("", "length") + USAGE + DONE,
}


@contextmanager
def wrong_server() -> Iterator[str]:
    """Returns each wrong response in turn."""
    answers = itertools.cycle(WRONG.values())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer = next(answers)
            self.send_response(503 if answer is None else 200)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *_: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_every_wrong_response_is_a_failure(tmp_path: Path) -> None:
    load = Load(users=6, seconds=2, tokens=TOKENS, workload=Workload.CHAT)
    with wrong_server() as host:
        assert run(host, tmp_path / "load", load, model="any") == 1
    (row,) = (row for row in read_rows(tmp_path / "load") if row.kind == "stream")
    assert row.failures == row.count >= len(WRONG)
    faults = " ".join(read_failures(tmp_path / "load"))
    assert [reason for reason in WRONG if reason not in faults] == []
