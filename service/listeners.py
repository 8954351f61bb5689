"""Listeners: sockets bound before anything slow begins, and uvicorn without its signal handlers."""

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
from service.errors import StartupError
from service.http_guard import GuardedProtocol, HttpLimits

SILENCE = 45  # seconds that a peer may leave what was sent unanswered


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises StartupError where the port is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small writes at once (TCP_NODELAY) only where the protocol is named.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _notice_silence(bound)
    try:
        bound.bind((host, port))
    except (OSError, UnicodeError) as error:
        bound.close()
        reason = error.strerror if isinstance(error, OSError) else "not an address"
        raise StartupError(f"cannot listen on {host}:{port}: {(reason or 'no').lower()}") from None
    return bound


def _notice_silence(bound: socket.socket) -> None:
    """Ends connections whose other side vanished without a word: no FIN, no RST, no answer.

    Connections inherit this. Data that nobody confirms counts, and so do probes where there is no
    data; without it the kernel would send again for a quarter of an hour.
    """
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_USER_TIMEOUT": SILENCE * 1000}
    for name, value in options.items():
        option = getattr(socket, name, None)  # macOS lacks some
        if option is not None:
            bound.setsockopt(socket.IPPROTO_TCP, option, value)


def address(bound: socket.socket) -> str:
    """http://host:port of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
        grace: float | None = 1.0,
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
                timeout_graceful_shutdown=None if grace is None else round(grace),
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

    async def cut_off(self) -> None:
        """Ends the open calls: drops the connections of those whose answers have begun, and cancels
        the others, which are answered with an error.
        """
        for connection in tuple(self.server_state.connections):
            if isinstance(connection, DroppingProtocol) and connection.cycle.response_started:
                connection.transport.abort()
        await asyncio.sleep(0.1)  # their calls end, as if the clients had left
        for call in tuple(self.server_state.tasks):
            call.cancel()

    def stop(self, *, at_once: bool = False) -> None:
        """Takes no new connections; open calls get `grace` seconds to end, or none."""
        self.should_exit = True
        self.force_exit = at_once
