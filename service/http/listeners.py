"""Listeners: one application on one socket each, served by uvicorn without its signal handlers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.api.http.call import DROP
from service.errors import StartupError
from service.http.acceptor import Acceptor
from service.http.connections import ConnectionLimits, Connections, Slot
from service.http.guard import GuardedProtocol, HttpLimits


class ServedProtocol(GuardedProtocol):
    """Guarded HTTP/1.x that reports to its connection slot whether it is idle or busy.

    It also gives the application a function that drops the connection: ASGI has none, and closing
    would wait for a client that reads nothing.
    """

    def __init__(self, *args: Any, slot: Slot, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._slot = slot

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._slot.abort = transport.abort
        super().connection_made(transport)
        if self._slot.refusal is not None:
            self._refuse(self._slot.refusal)
        else:
            self._slot.idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._slot.release()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"][DROP] = self.transport.abort
        if self._num_open == 0:
            self._slot.idle()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._num_open:  # 0: the request was answered before its end
            self._slot.busy()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._num_open == 0:
            self._slot.idle()


class Listener(uvicorn.Server):
    """One application on one socket, in an event loop that it shares with others.

    It handles no signals: the role stops all its listeners in its own order.
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
        if connections is None:  # an empty one is falsy
            connections = Connections(ConnectionLimits())
        self._acceptor = Acceptor(bound, connections)
        self.answering = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
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
        """Closes the port, then waits for open responses."""
        self._acceptor.stop()
        await super().shutdown(sockets=sockets)

    async def listen(self) -> None:
        """Serves until `stop`."""
        await self.serve(sockets=[self._bound])

    async def cut_off(self) -> None:
        """Ends all open calls: drops the connections whose responses have begun, and cancels the
        other calls, which get an error response.
        """
        for connection in tuple(self.server_state.connections):
            if isinstance(connection, ServedProtocol) and connection.cycle.response_started:
                connection.transport.abort()
        await asyncio.sleep(0.1)  # the calls of dropped connections end by themselves
        for call in tuple(self.server_state.tasks):
            call.cancel()

    def stop(self, *, at_once: bool = False) -> None:
        """Takes no new connections. Open calls get `grace` seconds to end, or none if `at_once`."""
        self.should_exit = True
        self.force_exit = at_once
