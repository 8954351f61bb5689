"""What the servers of a URL are like, for operators: durability, memory and latency."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from service.errors import StartupError
from service.queues.redis.connection import RedisClient, check_server
from service.queues.redis.servers import Shard, shards_of

_PROBES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """One shard's server. `fault` is why it cannot be used, and how to change that."""

    fault: str = ""
    version: str = ""
    append_only: bool = False
    fsync: str = ""  # always, everysec or no; empty: the server does not show it
    can_save: bool = True  # the last write of its append-only file succeeded
    used_memory: int = 0  # bytes
    max_memory: int = 0  # bytes; 0: no limit
    latency: float = 0.0  # median seconds of a write


async def inspect(url: str) -> Sequence[ServerState]:
    """The state of each shard's server. Raises StartupError for a malformed URL."""
    return await asyncio.gather(*map(_inspect, shards_of(url)))


async def _inspect(shard: Shard) -> ServerState:
    client = RedisClient(shard.server, scripts={}, restored=lambda: None)
    try:
        (info,) = await client.run_first([("INFO",)])
        check_server(info, allow_volatile=shard.allow_volatile)
        times = []
        for _ in range(_PROBES):
            began = perf_counter()
            await client.run_first([("DEL", shard.keys.probe)])
            times.append(perf_counter() - began)
    except StartupError as error:
        return ServerState(fault=str(error).removeprefix("queue: "))
    else:
        return ServerState(
            version=str(info["redis_version"]),
            append_only=bool(int(info.get("aof_enabled", 0))),
            fsync=await _fsync(client),
            can_save=str(info.get("aof_last_write_status", "ok")) == "ok",
            used_memory=int(info.get("used_memory", 0)),
            max_memory=int(info.get("maxmemory", 0)),
            latency=statistics.median(times),
        )
    finally:
        await client.close()


async def _fsync(client: RedisClient) -> str:
    """The setting `appendfsync`; empty if the server's user may not read it."""
    try:
        (reply,) = await client.run_first([("CONFIG", "GET", "appendfsync")])
    except StartupError:
        return ""
    pair = next(iter(reply.items()), None) if isinstance(reply, dict) else reply
    return pair[1].decode() if pair else ""
