"""Clients that close their sending side after the request, as `nc -N` does, and those that left.

Both look the same to the server until it sends something.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from service.http import half_closed
from tests.api.bad_input_rows import COMPLETIONS, B
from tests.api.raw_http_rows import Answer, answers, plain, request
from tests.api.test_http_layer import serving
from tests.cluster.relay import Connection, Relay

pytestmark = pytest.mark.slow


def completion(start: str = f"POST {COMPLETIONS} HTTP/1.1", **fields: Any) -> bytes:
    body = json.dumps(B | fields).encode()
    return request(f"Content-Length: {len(body)}", start=start, content=body)


def ask(place: tuple[str, int], sent: bytes) -> bytes:
    """Sends, closes the sending side, and reads to the end."""
    with socket.create_connection(place, timeout=20) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


async def answered(service: Any, sent: bytes) -> list[Answer]:
    async with serving(service.app) as place:
        return answers(await asyncio.to_thread(ask, place, sent))


async def test_a_probe_is_answered(service: Any) -> None:
    (answer,) = await answered(service, plain())
    assert (answer.status, answer.json()) == (200, {"status": "ok"})


async def test_an_answer_that_takes_a_while(service: Any) -> None:
    service.engine.pause = 0.02
    (answer,) = await answered(service, completion(max_tokens=20))
    assert answer.status == 200
    assert answer.json()["usage"]["completion_tokens"] == 20


async def test_a_stream_is_read_to_its_end(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes in between are comments, which no client sees as events."""
    monkeypatch.setattr(half_closed, "PROBE_INTERVAL", 0.01)
    service.engine.pause = 0.06
    (answer,) = await answered(service, completion(stream=True, max_tokens=20))
    lines = answer.body.split(b"\n")
    assert lines.count(b": probe") >= 2
    events = [line for line in lines if line.startswith(b"data: ")]
    assert events[-1] == b"data: [DONE]"
    assert set(lines) <= {*events, b": probe", b""}


async def test_pipelined_requests_all_get_their_answer(service: Any) -> None:
    found = await answered(service, plain() + completion() + plain())
    assert [answer.status for answer in found] == [200, 200, 200]


async def test_a_bad_request_behind_a_good_one_is_refused(service: Any) -> None:
    found = await answered(service, completion() + b"\0garbage\r\n\r\n")
    assert [answer.status for answer in found] == [200, 405]


@pytest.mark.parametrize("stream", [True, False])
async def test_http_1_0_gets_an_answer_and_no_interim_one(
    service: Any, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    monkeypatch.setattr(half_closed, "PROBE_INTERVAL", 0.01)
    service.engine.pause = 0.06
    sent = completion(f"POST {COMPLETIONS} HTTP/1.0", stream=stream, max_tokens=20)
    async with serving(service.app) as place:
        received = await asyncio.to_thread(ask, place, sent)
    assert received.startswith(b"HTTP/1.1 200")
    assert received.count(b"HTTP/1.1") == 1
    assert (b": probe\n" in received) is stream


async def test_a_request_that_is_cut_off_is_not_answered(service: Any) -> None:
    for part in (plain()[:20], completion()[:-5], b""):
        assert await answered(service, part) == []
    assert service.engine.seen == []


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_later_ends_the_work(
    service: Any, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    """It has closed its sending side before: its leaving sends nothing any more."""
    monkeypatch.setattr(half_closed, "PROBE_INTERVAL", 0.05)
    service.engine.pause = 30.0
    async with serving(service.app) as place:
        with socket.create_connection(place, timeout=20) as connection:
            connection.sendall(completion(stream=stream, max_tokens=200))
            connection.shutdown(socket.SHUT_WR)
            await until(lambda: len(service.engine.seen) == 1)
            await asyncio.sleep(0.3)
            assert service.queue._running, "it still reads"
        await until(lambda: not service.queue._running)
    (seen,) = service.engine.seen
    (*_, end) = await service.queue.read(seen.id)
    assert end.reason == "cancelled"


class Passing(Relay):
    """A proxy that passes on what it gets, and the end of each direction by itself."""

    def __init__(self, place: tuple[str, int]) -> None:
        super().__init__()
        self._place = place

    async def connect(self) -> Connection:
        return await asyncio.open_connection(*self._place)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_behind_a_proxy_that_leaves_ends_the_work(
    service: Any, *, stream: bool
) -> None:
    """The proxy takes the first probe, and notices with the second that its client is gone."""
    service.engine.pause = 30.0
    async with serving(service.app) as place, Passing(place) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as connection:
            connection.sendall(completion(stream=stream, max_tokens=200))
            await until(lambda: len(service.engine.seen) == 1)
        await until(lambda: not service.queue._running)
