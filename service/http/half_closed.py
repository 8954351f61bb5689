"""HalfClosed: a client that closed its sending side while its answer is still being made.

It may only have finished sending, as `nc -N` does, or it may be gone: both look the same until
something is sent to it. A client that reads skips an interim response or a comment; the system of a
client that is gone answers with a reset.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

CHECK_INTERVAL = 0.05  # seconds between two looks for a reset
FIRST_INTERVAL = 0.25  # seconds to the second probe, for a proxy that passes the first one on
PROBE_INTERVAL = 5.0  # seconds between two probes in the end: the client may also leave later


class HalfClosed:
    """Sends `probe()` now and then, and aborts the connection after a reset.

    An event loop reports a reset only to a transport that reads or writes, and this one no longer
    reads.
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
        """Ends the watch; the connection is left as it is."""
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
