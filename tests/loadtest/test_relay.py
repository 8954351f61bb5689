"""The relays of the fault tests break a connection only if a test demands it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.cluster.balancer import Balancer
from tests.faults.proxy import FaultProxy


@asynccontextmanager
async def answering(pieces: int) -> AsyncIterator[int]:
    """A server's port: it reads to the end of the request, then answers slowly."""
    handlers: list[asyncio.Task[None]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
            for _ in range(pieces):
                writer.write(b"piece")
                await writer.drain()
                await asyncio.sleep(0.005)
                gc.collect()
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.create_task(answer(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.wait(handlers)
        for handler in handlers:
            assert handler.exception() is None or isinstance(handler.exception(), ConnectionError)


async def test_a_half_closed_client_gets_the_whole_response() -> None:
    """Half closed, nothing but the relay itself holds its task."""
    async with answering(3) as port, Balancer(lambda: [("127.0.0.1", port)]) as balancer:
        reader, writer = await asyncio.open_connection("127.0.0.1", balancer.port)
        writer.write(b"?")
        writer.write_eof()
        assert await reader.read() == b"piece" * 3
        writer.close()
        await writer.wait_closed()


@pytest.mark.slow
async def test_a_cut_breaks_both_ends_and_the_next_connection_passes() -> None:
    async with answering(3) as port, FaultProxy(port) as proxy:
        for broken in (True, False):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"?")
            writer.write_eof()
            assert await reader.readexactly(5) == b"piece"
            if broken:
                proxy.cut()
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await reader.readexactly(10)
            else:
                assert await reader.read() == b"piece" * 2
            writer.close()


async def test_nothing_is_left_if_a_client_stays() -> None:
    async with answering(1000) as port:
        before = asyncio.all_tasks()
        async with Balancer(lambda: [("127.0.0.1", port)]) as balancer:
            reader, writer = await asyncio.open_connection("127.0.0.1", balancer.port)
            writer.write(b"?")
            writer.write_eof()
            await reader.readexactly(5)
            there = len(asyncio.all_tasks() - before)
        assert there == 3, "the relay, its direction back and the server's answer"
        assert len(asyncio.all_tasks() - before) <= 1, "the server may still have to notice"
        writer.close()
