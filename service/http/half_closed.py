"""HalfClosed: a client that closed its sending side while its response is still open.

It may only have finished sending, as `nc -N` does, or it may have disconnected: the two differ only
in what happens when the server sends. A client that reads skips an interim response or an SSE
comment; for a client that disconnected, its system answers with a reset.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

CHECK_INTERVAL = 0.05  # seconds between two checks for a reset
FIRST_INTERVAL = 0.25  # seconds to the second probe, as a proxy may forward the first one
PROBE_INTERVAL = 5.0  # seconds, at most, between later probes: the client may disconnect later


class HalfClosed:
    """Sends `probe()` at intervals, and aborts the connection after a reset.

    It checks the socket itself: an event loop reports a reset only to a transport that reads or
    writes, and this one no longer reads.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        *,
        probe: Callable[[], bytes],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._transport = transport
        self._socket: socket.socket = transport.get_extra_info("socket")
        self._probe = probe
        self._loop = loop
        self._next_probe = loop.time()
        self._interval = FIRST_INTERVAL
        self._timer = loop.call_soon(self._check)

    def stop(self) -> None:
        """Stops probing; leaves the connection open."""
        self._timer.cancel()

    def _check(self) -> None:
        if self._transport.is_closing():
            return
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._transport.abort()
            return
        if self._loop.time() >= self._next_probe and not self._transport.get_write_buffer_size():
            self._interval = min(self._interval, PROBE_INTERVAL)
            self._next_probe = self._loop.time() + self._interval
            self._interval *= 2
            self._transport.write(self._probe())
        self._timer = self._loop.call_later(CHECK_INTERVAL, self._check)
