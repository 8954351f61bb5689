"""Balancer: a TCP port in front of API replicas; connections are distributed round robin."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from service.bench.sse import Address
from tests.cluster.relay import Connection, Relay

PATIENCE = 5.0  # seconds that a connection waits for a replica


class Balancer(Relay):
    """`addresses` returns the current replicas. No retries once connected."""

    def __init__(self, addresses: Callable[[], Sequence[Address]]) -> None:
        super().__init__()
        self.connections = 0
        self._addresses = addresses

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self) -> Connection:
        """Connects to the next replica that accepts. Raises TimeoutError if none does."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for _ in addresses if (addresses := self._addresses()) else ():
                    self.connections += 1
                    with contextlib.suppress(OSError):
                        return await asyncio.open_connection(
                            *addresses[self.connections % len(addresses)]
                        )
                await asyncio.sleep(0.05)
