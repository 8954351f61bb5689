"""FaultProxy: a TCP proxy that injects network faults.

`delay` delays each chunk of a reply, `swallow_replies` drops replies but not requests, `black_hole`
drops everything while connections stay open, `cut` aborts all connections.
"""

from __future__ import annotations

import asyncio

from tests.cluster.relay import Connection, Relay


class FaultProxy(Relay):
    """In front of `target_port` of the loopback."""

    def __init__(self, target_port: int) -> None:
        super().__init__()
        self.delay = 0.0
        self.swallow_replies = False
        self.black_hole = False
        self.swallowed = 0
        self._target_port = target_port

    async def connect(self) -> Connection:
        return await asyncio.open_connection("127.0.0.1", self._target_port)

    async def passes(self, chunk: bytes, *, reply: bool) -> bool:
        if self.black_hole or (reply and self.swallow_replies):
            self.swallowed += len(chunk)
            return False
        if reply and self.delay:
            await asyncio.sleep(self.delay)
        return True
