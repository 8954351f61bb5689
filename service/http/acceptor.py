"""Acceptor: accepts connections from a listening socket while there are slots for them.

asyncio's servers accept all connections: a burst would use up the process's descriptors before any
could be refused, and the process's other ports and its client of Redis would fail, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable
from functools import partial

from service.http.connections import Connections, Slot

log = logging.getLogger("quire")

BACKLOG = 2048  # connections that the kernel queues until they are accepted
BATCH = 16  # connections accepted per iteration of the event loop
PAUSE = 0.5  # seconds without accepting after the system ran out of descriptors
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

MakeProtocol = Callable[[Slot], asyncio.Protocol]


class Acceptor:
    """Accepts on `bound`, with one protocol per connection, in the event loop that starts it."""

    def __init__(self, bound: socket.socket, connections: Connections) -> None:
        self._bound = bound
        self._connections = connections
        self._opening: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._paused = False

    def start(self, make_protocol: MakeProtocol) -> None:
        """Starts to listen. Raises OSError if another process listens on the port."""
        self._loop = asyncio.get_running_loop()
        self._make_protocol = make_protocol
        self._bound.settimeout(0)
        self._bound.listen(BACKLOG)
        self._resume()

    def stop(self) -> None:
        """Stops accepting. Connections stay open; the caller closes the socket."""
        self._loop.remove_reader(self._bound.fileno())
        if self._retry is not None:
            self._retry.cancel()

    def _resume(self) -> None:
        self._loop.add_reader(self._bound.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(BATCH):
            try:
                connection, peer = self._bound.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._pause(error.strerror or "no descriptors")
                return
            self._paused = False
            self._open(connection, str(peer[0]))

    def _pause(self, reason: str) -> None:
        """Pauses; descriptors may be closed meanwhile. Logged once until one is accepted again."""
        if not self._paused:
            log.warning("cannot accept connections: %s", reason.lower())
        self._paused = True
        self._loop.remove_reader(self._bound.fileno())
        self._retry = self._loop.call_later(PAUSE, self._resume)

    def _open(self, connection: socket.socket, host: str) -> None:
        slot = self._connections.admit(host)
        if slot is None:
            connection.close()
            return
        task = self._loop.create_task(self._serve(connection, slot))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _serve(self, connection: socket.socket, slot: Slot) -> None:
        """Creates the connection's transport and protocol, which then run on their own."""
        transport = None
        try:
            connection.settimeout(0)
            with contextlib.suppress(OSError):  # the client may have disconnected
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                transport, _ = await self._loop.connect_accepted_socket(
                    partial(self._make_protocol, slot), connection
                )
        finally:
            if transport is None:
                slot.release()
                connection.close()
