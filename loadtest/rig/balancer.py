"""Balancer: a TCP port before API replicas, as a Service is: each connection goes to another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from loadtest.rig.client import Address

PATIENCE = 5.0  # seconds that a connection waits for a replica


class Balancer:
    """`addresses` tells the replicas that are in it now. It knows no HTTP and repeats nothing."""

    def __init__(self, addresses: Callable[[], Sequence[Address]]) -> None:
        self.connections = 0
        self._addresses = addresses
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

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
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there: asyncio.StreamWriter | None = None
        try:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    back, there = await self._connect()
                await asyncio.gather(_pump(reader, there), _pump(back, writer))
        finally:
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the next replica that takes a connection. Ends by the caller's patience."""
        while True:
            for _ in addresses if (addresses := self._addresses()) else ():
                self.connections += 1
                with contextlib.suppress(OSError):
                    return await asyncio.open_connection(
                        *addresses[self.connections % len(addresses)]
                    )
            await asyncio.sleep(0.05)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All bytes and the end of one direction."""
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
