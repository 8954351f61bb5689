"""Relay: a TCP port of the loopback that passes bytes to a server behind it, and knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Relay:
    """Open while it is entered; at its end every connection through it is broken.

    A subclass says where a connection goes (`connect`) and may spoil what passes (`passes`).
    """

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        # The loop alone does not hold a task: one that waits on a half-closed connection would be
        # collected as garbage in the middle of an answer.
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1000)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Breaks every open connection, both ends at once."""
        for connection in self._connections:
            connection.cancel()

    async def connect(self) -> Connection:
        """To the server behind. OSError: there is none, and the caller's connection is broken."""
        raise NotImplementedError

    async def passes(self, piece: bytes, *, reply: bool) -> bool:
        """Asked for each piece of a request or a reply before it is passed on."""
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
        """All bytes and the end of one direction."""
        while piece := await reader.read(65536):
            if await self.passes(piece, reply=reply):
                writer.write(piece)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
