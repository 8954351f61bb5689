"""FaultProxy: a TCP proxy between a client and its server that can spoil the connection.

`delay` holds each piece of a reply back, `swallow_replies` lets requests through and replies not,
`black_hole` lets nothing through while connections stay open, `cut` breaks all that are open.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self


class FaultProxy:
    """Listens on a free port of the loopback while it is entered."""

    def __init__(self, target_port: int) -> None:
        self.delay = 0.0
        self.swallow_replies = False
        self.black_hole = False
        self.swallowed = 0
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
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
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Resets every open connection."""
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, there[1]}
        both = (
            self._pump(reader, there[1], replies=False),
            self._pump(there[0], writer, replies=True),
        )
        for pump in both:
            task = asyncio.create_task(pump)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool
    ) -> None:
        try:
            with contextlib.suppress(OSError):
                while piece := await reader.read(65536):
                    if self.black_hole or (replies and self.swallow_replies):
                        self.swallowed += len(piece)
                        continue
                    if replies and self.delay:
                        await asyncio.sleep(self.delay)
                    writer.write(piece)
                    await writer.drain()
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
