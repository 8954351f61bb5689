"""FaultProxy: a TCP proxy between a client and its server that can spoil the connection.

`delay` holds each piece of a reply back, `swallow_replies` lets requests through and replies not,
`black_hole` lets nothing through while connections stay open, `cut` breaks all that are open.
"""

from __future__ import annotations

import asyncio

from tests.cluster.relay import Connection, Relay


class FaultProxy(Relay):
    """Before the server on `target_port` of the loopback."""

    def __init__(self, target_port: int) -> None:
        super().__init__()
        self.delay = 0.0
        self.swallow_replies = False
        self.black_hole = False
        self.swallowed = 0
        self._target_port = target_port

    async def connect(self) -> Connection:
        return await asyncio.open_connection("127.0.0.1", self._target_port)

    async def passes(self, piece: bytes, *, reply: bool) -> bool:
        if self.black_hole or (reply and self.swallow_replies):
            self.swallowed += len(piece)
            return False
        if reply and self.delay:
            await asyncio.sleep(self.delay)
        return True
