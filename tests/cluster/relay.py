"""Relay: a TCP port of the loopback that forwards bytes to a server."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Relay:
    """A context manager; at its end it aborts all connections through it.

    Subclasses choose the server (`connect`) and may delay or drop data (`passes`).
    """

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        # The event loop keeps only weak references to tasks: one that waits on a half-closed
        # connection would be garbage-collected in the middle of a response.
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1000)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Aborts every open connection at both ends."""
        for connection in self._connections:
            connection.cancel()

    async def connect(self) -> Connection:
        """Connects to the server. OSError aborts the client's connection."""
        raise NotImplementedError

    async def passes(self, chunk: bytes, *, reply: bool) -> bool:
        """Whether to forward this chunk of a request or a reply."""
        return True

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._relay(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there: asyncio.StreamWriter | None = None
        try:
            back, there = await self.connect()
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, there, reply=False))
                both.create_task(self._pump(back, writer, reply=True))
        except* OSError:
            pass
        finally:
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, reply: bool
    ) -> None:
        """Forwards one direction, its end included."""
        while chunk := await reader.read(65536):
            if await self.passes(chunk, reply=reply):
                writer.write(chunk)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
