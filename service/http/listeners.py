"""Listeners: one application on one socket each, and uvicorn without its signal handlers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.api.call import DROP
from service.errors import StartupError
from service.http.acceptor import Acceptor
from service.http.connections import ConnectionLimits, Connections, Slot
from service.http.guard import GuardedProtocol, HttpLimits


class ServedProtocol(GuardedProtocol):
    """Guarded HTTP/1.1 in one of the port's places, and a way for the application to end it.

    ASGI cannot drop a connection, and closing one waits for a client that reads nothing.
    """

    def __init__(self, *args: Any, slot: Slot, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._slot = slot

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Waits for a request, or refuses any if there is no place."""
        self._slot.abort = transport.abort
        super().connection_made(transport)
        if self._slot.refusal is not None:
            self._refuse(self._slot.refusal)
        else:
            self._slot.idle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gives the place to others."""
        self._slot.release()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Puts `DROP` into the state of the request that begins."""
        super().on_message_begin()
        self.scope["state"][DROP] = self.transport.abort
        if self._open == 0:
            self._slot.idle()

    def on_message_complete(self) -> None:
        """The request is whole: unless it was refused before, its answer is being made."""
        super().on_message_complete()
        if self._open:
            self._slot.busy()

    def on_response_complete(self) -> None:
        """The connection waits for the next request, if no pipelined one is there."""
        super().on_response_complete()
        if self._open == 0:
            self._slot.idle()


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
        connections: Connections | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=ServedProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=None if grace is None else round(grace),
            )
        )
        self._bound = bound
        self._limits = limits or HttpLimits()
        if connections is None:
            connections = Connections(ConnectionLimits())
        self._acceptor = Acceptor(bound, connections)
        self.answering = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
        """Starts the application, then opens the port. Raises StartupError if it is taken."""
        await super().startup(sockets=[])
        try:
            self._acceptor.start(self._make_protocol)
        except OSError as error:
            host, port = self._bound.getsockname()[:2]
            reason = (error.strerror or "no").lower()
            raise StartupError(f"cannot listen on {host}:{port}: {reason}") from None
        self.answering.set()

    def _make_protocol(self, slot: Slot) -> asyncio.Protocol:
        return ServedProtocol(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            limits=self._limits,
            slot=slot,
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the port, then waits for open answers."""
        self._acceptor.stop()
        await super().shutdown(sockets=sockets)

    async def listen(self) -> None:
        """Serves until `stop`."""
        await self.serve(sockets=[self._bound])

    async def cut_off(self) -> None:
        """Ends the open calls: drops the connections of those whose answers have begun, and cancels
        the others, which are answered with an error.
        """
        for connection in tuple(self.server_state.connections):
            if isinstance(connection, ServedProtocol) and connection.cycle.response_started:
                connection.transport.abort()
        await asyncio.sleep(0.1)  # their calls end, as if the clients had left
        for call in tuple(self.server_state.tasks):
            call.cancel()

    def stop(self, *, at_once: bool = False) -> None:
        """Takes no new connections; open calls get `grace` seconds to end, or none."""
        self.should_exit = True
        self.force_exit = at_once
