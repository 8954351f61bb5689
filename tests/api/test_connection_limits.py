"""Limits on connections over sockets: what is refused, with what answer, and what goes on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from service.http import acceptor
from service.http.connections import ConnectionLimits, Connections, Slot
from service.http.listeners import Listener
from service.http.ports import address, bind
from tests.api.bad_input_rows import COMPLETIONS, B
from tests.api.raw_http_rows import Answer, answers, plain, request
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.slow

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def serving(app: Any, **limits: int) -> AsyncIterator[tuple[Connections, Callable[..., Any]]]:
    """The server's places, and what connects to it from an address of the loopback."""
    bound = bind("127.0.0.1", 0)
    limits = {"total": 4, "per_address": 4, "refused": 2} | limits
    places = Connections(ConnectionLimits(**limits))
    listener = Listener(app, bound, connections=places)
    task = asyncio.create_task(listener.listen())
    await listener.answering.wait()
    port = int(address(bound).rpartition(":")[2])
    opened: list[asyncio.StreamWriter] = []

    async def connect(source: str = "127.0.0.1") -> Pair:
        pair = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        opened.append(pair[1])
        return pair

    try:
        yield places, connect
    finally:
        for writer in opened:
            writer.close()
        listener.stop()
        await task


def completion(**fields: Any) -> bytes:
    body = json.dumps(B | fields).encode()
    return request(
        f"Content-Length: {len(body)}", start=f"POST {COMPLETIONS} HTTP/1.1", content=body
    )


async def ask(pair: Pair, sent: bytes) -> bytes:
    """The head of the answer to a request."""
    pair[1].write(sent)
    async with asyncio.timeout(PATIENCE):
        return await pair[0].readuntil(b"\r\n\r\n")


async def rest(pair: Pair) -> bytes:
    async with asyncio.timeout(PATIENCE):
        with contextlib.suppress(ConnectionResetError):
            return await pair[0].read()
        return b""


STREAM = completion(stream=True, max_tokens=200)


async def refusal(pair: Pair) -> Answer:
    pair[1].write(plain())  # a client sends before it reads
    (answer,) = answers(await rest(pair))
    return answer


async def test_streams_are_never_ended_for_a_newcomer(service: Any) -> None:
    """The newcomer is refused with an answer, and served as soon as there is a place."""
    service.engine.pause = 0.05
    async with serving(service.app, total=2) as (places, connect):
        streams = [await connect("127.0.0.2"), await connect("127.0.0.3")]
        for stream in streams:
            assert b" 200 " in await ask(stream, STREAM)
        service.engine.pause = PATIENCE
        answer = await refusal(await connect("127.0.0.4"))
        assert answer.status == 503
        assert answer.json()["error"]["code"] == "too_many_connections"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["connection"] == "close"
        assert len(places) == 2
        streams[0][1].close()
        await until(lambda: len(places) == 1)
        assert b" 200 " in await ask(await connect("127.0.0.4"), plain())
        assert not streams[1][0].at_eof()


async def test_one_address_cannot_take_all_places(service: Any) -> None:
    service.engine.pause = 0.05
    async with serving(service.app, per_address=2) as (_, connect):
        for _ in range(2):
            assert b" 200 " in await ask(await connect(), STREAM)
        service.engine.pause = PATIENCE
        answer = await refusal(await connect())
        assert answer.status == 429
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.json()["error"]["code"] == "too_many_connections"
        assert b" 200 " in await ask(await connect("127.0.0.2"), plain())


async def test_idle_connections_and_slow_bodies_give_way(service: Any) -> None:
    """Nothing yet, half a head, half a body, an answered request: all of these wait."""
    waiting = [b"", plain()[:20], request("Content-Length: 100", content=b"{"), plain()]
    async with serving(service.app) as (places, connect):
        old = []
        for sent in waiting:
            pair = await connect()
            pair[1].write(sent)
            old.append(pair)
        assert b" 200 " in await old[-1][0].readuntil(b"\r\n\r\n")
        await until(lambda: len(places) == 4)
        new = [await connect() for _ in waiting]
        for pair in new:
            assert b" 200 " in await ask(pair, plain())
        for pair in old:
            assert b"HTTP/1.1 4" not in await rest(pair), "it was closed, not answered"
        assert len(places) == 4


async def test_a_request_ends_the_wait_of_its_connection(service: Any) -> None:
    """The first connection of four is the one that was used last: another gives way."""
    async with serving(service.app) as (_, connect):
        pairs = [await connect() for _ in range(4)]
        assert b" 200 " in await ask(pairs[0], plain())
        await pairs[0][0].readuntil(b"}")
        assert b" 200 " in await ask(await connect(), plain())
        assert await rest(pairs[1]) == b""
        assert b" 200 " in await ask(pairs[0], plain())


async def test_refusals_are_bounded(service: Any) -> None:
    """Beyond those that are answered, connections are closed without a word, and cost nothing."""
    service.engine.pause = 0.05
    async with serving(service.app, total=1, refused=2) as (places, connect):
        assert b" 200 " in await ask(await connect("127.0.0.2"), STREAM)
        service.engine.pause = PATIENCE
        silent = [await connect() for _ in range(6)]  # none reads nor closes
        received = await asyncio.gather(*(rest(pair) for pair in silent))
        assert sum(b" 503 " in part for part in received) == 2
        assert received.count(b"") == 4
        assert len(places) == 1


async def test_the_places_of_pipelined_requests_and_bad_ones_are_given_back(service: Any) -> None:
    async with serving(service.app) as (places, connect):
        for sent in (
            plain() * 5 + plain("Connection: close"),
            b"\0garbage\r\n\r\n",
            request("Content-Length: 100000000", content=b"{"),
            completion() + b"\0garbage",
        ):
            pair = await connect()
            pair[1].write(sent)
            assert await rest(pair)
            pair[1].close()
        await until(lambda: len(places) == 0)
        assert places._groups == {}
        assert not places._idle


class Exhausted(socket.socket):
    """A listening socket whose process has no descriptor left for some connections."""

    failures = 3

    def accept(self) -> tuple[socket.socket, Any]:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_accepting_goes_on_after_descriptors_ran_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection waits in the kernel, the loop is not kept busy, and one line is logged."""
    monkeypatch.setattr(acceptor, "PAUSE", 0.02)
    made = asyncio.Event()

    def make_protocol(_slot: Slot) -> asyncio.Protocol:
        made.set()
        return asyncio.Protocol()

    with Exhausted() as bound:
        bound.bind(("127.0.0.1", 0))
        accepting = acceptor.Acceptor(bound, Connections(ConnectionLimits()))
        accepting.start(make_protocol)
        _, writer = await asyncio.open_connection(*bound.getsockname())
        async with asyncio.timeout(PATIENCE):
            await made.wait()
        writer.close()
        accepting.stop()
    assert bound.failures < 0
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["cannot accept connections: too many open files"]
