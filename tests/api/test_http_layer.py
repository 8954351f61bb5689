"""The layer below the application: bytes that are no HTTP, too many of them, and too slow ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.http.guard import HttpLimits
from service.http.listeners import Listener
from service.http.ports import address, bind
from tests.api import raw_http_rows as table
from tests.api.bad_input_rows import B
from tests.api.raw_http_rows import (
    GOOD,
    LAST,
    LENGTH,
    Answer,
    RawRow,
    answers,
    exchange,
    plain,
    request,
)
from tests.support.waiting import PATIENCE

ROWS = list(table.raw_rows())
HEAD = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
QUICK = HttpLimits(head_timeout=0.2, linger=0.1)


@asynccontextmanager
async def serving(app: FastAPI, limits: HttpLimits | None = None) -> AsyncIterator[tuple[str, int]]:
    bound = bind("127.0.0.1", 0)
    listener = Listener(app, bound, limits=limits)
    task = asyncio.create_task(listener.listen())
    await listener.answering.wait()
    try:
        url = httpx.URL(address(bound))
        assert url.port
        yield url.host, url.port
    finally:
        listener.stop()
        await task


def check(row: RawRow, received: list[Answer]) -> None:
    """The answers are those of the row, and every refusal has our shape."""
    assert tuple(answer.status for answer in received) == row.statuses
    for answer in received:
        assert answer.headers["x-request-id"].startswith("s0-")
        if answer.status >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            assert len(answer.body) < 300
            if row.code is not None:
                assert error["code"] == row.code
            if answer.status == 405:
                assert answer.headers["allow"]
    assert received[-1].headers["connection"] == "close"


@pytest.mark.parametrize("step", [None, pytest.param(1000, marks=pytest.mark.slow)])
async def test_every_row(service: Any, step: int | None) -> None:
    """Each on a connection of its own, until the server ends it; at once, and in pieces."""
    wrong = []
    async with serving(service.app, QUICK) as place:
        for row in ROWS:
            received: list[Answer] = []
            try:
                received = await asyncio.to_thread(
                    exchange, place, row.sent, timeout=PATIENCE, step=step
                )
                check(row, received)
            except (AssertionError, OSError, KeyError, IndexError, ValueError) as error:
                statuses = [(answer.status, answer.body[:150]) for answer in received]
                wrong.append((str(row), repr(error)[:200], statuses[-3:]))
        reply = await asyncio.to_thread(exchange, place, table.plain(table.LAST))
        assert reply[0].status == 200
    assert wrong == []


@pytest.mark.slow
async def test_an_answer_under_way_is_not_written_into(service: Any) -> None:
    """What follows a request is refused, but after its answer, streamed to the end."""
    service.engine.pause = 0.002
    body = json.dumps(B | {"stream": True, "max_tokens": 20}).encode()
    streamed = request(f"Content-Length: {len(body)}", content=body)
    async with serving(service.app) as place:
        for after in (b"\0garbage", request("Content-Length: -1"), b"GET /" + b"a" * 10_000):
            first, last = await asyncio.to_thread(exchange, place, streamed + after)
            assert first.body.endswith(b"data: [DONE]\n\n")
            assert last.status in {400, 405, 414}
            assert last.headers["connection"] == "close"


@pytest.mark.slow
async def test_http_1_0_gets_a_stream_without_chunks(service: Any) -> None:
    body = json.dumps(B | {"stream": True}).encode()
    length = f"Content-Length: {len(body)}"
    async with serving(service.app) as place:
        sent = request(length, start="POST /v1/completions HTTP/1.0", content=body)
        (old,) = await asyncio.to_thread(exchange, place, sent)
        (new,) = await asyncio.to_thread(exchange, place, request(length, LAST, content=body))
    assert "transfer-encoding" not in old.headers
    assert new.headers["transfer-encoding"] == "chunked"
    lines = [line for line in old.body.split(b"\n") if line.startswith(b"data: ")]
    assert len(lines) == new.body.count(b"data: ")
    assert old.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.slow
async def test_100_is_sent_before_the_body_is(service: Any) -> None:
    async with serving(service.app) as place:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(request(LENGTH, LAST, "Expect: 100-continue"))
        async with asyncio.timeout(PATIENCE):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(GOOD)
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.slow
async def test_a_refused_upload_can_still_be_read_about(service: Any) -> None:
    """The client sends all of its 20 MiB, and looks for an answer only then: no reset comes."""
    body = b" " * (20 * 2**20)

    def upload(place: tuple[str, int]) -> bytes:
        with socket.create_connection(place, timeout=PATIENCE) as connection:
            connection.sendall(request(f"Content-Length: {len(body)}", content=body))
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(2**16), b""))

    async with serving(service.app, HttpLimits(linger=10)) as place:
        (answer,) = answers(await asyncio.to_thread(upload, place))
    assert (answer.status, answer.json()["error"]["code"]) == (413, "request_too_large")


async def _read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    """All bytes; a reset is an end too: the server closed while the client was sending."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := await reader.read(2**16):
            received += part
    return received


async def drip(place: tuple[str, int], first: bytes, then: bytes, pause: float) -> bytes:
    """Sends `then` byte by byte until the server ends the connection. Returns what it sent."""
    reader, writer = await asyncio.open_connection(*place)
    writer.write(first)
    receiving = asyncio.create_task(_read_to_the_end(reader))
    for byte in then:
        if receiving.done():
            break
        writer.write(bytes([byte]))
        await asyncio.sleep(pause)
    async with asyncio.timeout(PATIENCE):
        received = await receiving
    writer.close()
    return received


# Beyond the linger a client that sends is reset, and may lose what it has not read by then.
SLOW = HttpLimits(head_timeout=0.15, linger=3.0)
BODY = request("Content-Length: 100000")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "status"),
    [
        (b"", b"", None),
        (b"", plain("X: " + "a" * 1000), 408),
        (b"", b"\r\n" * 500, 408),
        (plain(), plain("X: " + "a" * 1000), 408),
        (BODY, b"{" * 1000, 408),
        (request("Content-Length: 100000", start="POST /nowhere HTTP/1.1"), b"{" * 1000, 404),
        (request("Transfer-Encoding: chunked"), b"1;" + b"a" * 1000, 408),
        (plain("Content-Length: 100000"), b"a" * 1000, 200),
    ],
    ids=["silence", "head", "empty lines", "a second head", "body", "an unread body", "extension",
         "the body of a GET"],
)  # fmt: skip
async def test_bytes_that_drip(
    start_service: Any, small_limits: Any, first: bytes, then: bytes, status: int | None
) -> None:
    """The connection ends, however steadily bytes come; with 408 if an answer is open."""
    async with (
        start_service(limits=small_limits(body_timeout=0.15)) as service,
        serving(service.app, SLOW) as place,
    ):
        async with asyncio.timeout(PATIENCE):  # all of these bytes would take longer
            received = answers(await drip(place, first, then * 100, pause=0.01))
    if status is None:
        assert received == []
    else:
        assert received[-1].status == status
        if status == 408:
            assert received[-1].json()["error"]["code"] == "request_timeout"
            assert received[-1].headers["connection"] == "close"


@pytest.mark.slow
async def test_slow_but_in_time_is_served(service: Any) -> None:
    """Each request on a connection has its own time: together they take longer."""
    async with serving(service.app, HttpLimits(head_timeout=2.0)) as place:
        began = time.monotonic()
        received = answers(await drip(place, b"", plain() * 9 + plain(LAST), pause=0.005))
        assert [answer.status for answer in received] == [200] * 10
        assert time.monotonic() - began > 2.0


@pytest.mark.slow
async def test_silence_between_requests_is_allowed(service: Any) -> None:
    async with serving(service.app, SLOW) as place:
        reader, writer = await asyncio.open_connection(*place)
        for last in (False, True):
            writer.write(plain(LAST) if last else plain())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            if not last:
                await reader.readuntil(b'{"status":"ok"}')
                await asyncio.sleep(0.3)
        writer.close()


@pytest.mark.slow
async def test_an_answer_may_take_longer_than_its_request(service: Any) -> None:
    """Nothing is timed while an answer is open, not even a second request's half head."""
    service.engine.pause = 0.02
    body = json.dumps(B | {"stream": True, "max_tokens": 30}).encode()
    streamed = request(f"Content-Length: {len(body)}", content=body)
    async with serving(service.app, SLOW) as place:
        first, last = await asyncio.to_thread(exchange, place, streamed + b"GET /heal")
    assert first.body.endswith(b"data: [DONE]\n\n")
    assert last.status == 408
