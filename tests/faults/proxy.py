"""FaultProxy: a TCP proxy that injects network faults.

`delay` delays each chunk of a reply, `swallow_replies` drops replies but not requests (from the
first request on that contains `swallow_from`, if it is set), `black_hole` drops everything while
connections stay open, `cut` aborts all connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.cluster.cluster import AOF, Cluster
from tests.cluster.redis_process import RedisServer
from tests.cluster.relay import Connection, Relay


class FaultProxy(Relay):
    """In front of `target_port` of the loopback."""

    def __init__(self, target_port: int) -> None:
        super().__init__()
        self.delay = 0.0
        self.swallow_replies = False
        self.swallow_from = b""
        self.black_hole = False
        self.swallowed = 0
        self._target_port = target_port

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def redirect(self, target_port: int) -> None:
        """New connections go to this port; open ones stay."""
        self._target_port = target_port

    async def connect(self) -> Connection:
        return await asyncio.open_connection("127.0.0.1", self._target_port)

    async def passes(self, chunk: bytes, *, reply: bool) -> bool:
        if not reply and self.swallow_from and self.swallow_from in chunk:
            self.swallow_replies = True
        if self.black_hole or (reply and self.swallow_replies):
            self.swallowed += len(chunk)
            return False
        if reply and self.delay:
            await asyncio.sleep(self.delay)
        return True


@asynccontextmanager
async def replicated_redis(
    cluster: Cluster,
) -> AsyncIterator[tuple[FaultProxy, FaultProxy, RedisServer]]:
    """Yields a proxy in front of the primary, which engines and an API replica use, a proxy on the
    replication link, and the replica of Redis.
    """
    cluster.ask("CONFIG", "SET", "repl-diskless-sync-delay", "0")
    primary = cluster.redis
    async with FaultProxy(primary.port) as front, FaultProxy(primary.port) as link:
        options = (*AOF, "--replicaof", "127.0.0.1", str(link.port))
        replica = RedisServer(cluster.folder / "replica", options=options)
        await asyncio.to_thread(replica.start)
        try:
            await asyncio.to_thread(cluster.start_replicas, queue=front.redis_url)
            yield front, link, replica
        finally:
            cluster.redis = primary
            replica.close()
