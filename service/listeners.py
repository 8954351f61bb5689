"""Listeners: one application on one socket each, and uvicorn without its signal handlers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from functools import partial
from typing import cast

import uvicorn
from fastapi import FastAPI

from service.api.connection import DROP
from service.http_guard import GuardedProtocol, HttpLimits


class DroppingProtocol(GuardedProtocol):
    """Guarded HTTP/1.1, and a way for the application to drop a connection.

    ASGI has none, and to close one waits for a reader who takes nothing.
    """

    def on_message_begin(self) -> None:
        """Puts `DROP` into the state of the request that begins."""
        super().on_message_begin()
        self.scope["state"][DROP] = self.transport.abort


class Listener(uvicorn.Server):
    """One application on one socket, in a loop that it shares with others.

    Signals are the role's business: it stops all its listeners in its own order.
    """

    def __init__(
        self,
        app: FastAPI,
        bound: socket.socket,
        *,
        grace: float = 1.0,
        limits: HttpLimits | None = None,
    ) -> None:
        protocol = partial(DroppingProtocol, limits=limits or HttpLimits())
        super().__init__(
            uvicorn.Config(
                app,
                http=cast("type[asyncio.Protocol]", protocol),  # is called, no more
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=round(grace),
            )
        )
        self._bound = bound
        self.answering = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the port and says so."""
        await super().startup(sockets=sockets)
        self.answering.set()

    async def listen(self) -> None:
        """Serves until `stop`."""
        await self.serve(sockets=[self._bound])

    def stop(self, *, at_once: bool = False) -> None:
        """Takes no new connections; open calls get `grace` seconds to end, or none."""
        self.should_exit = True
        self.force_exit = at_once
