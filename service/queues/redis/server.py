"""What a Redis server must be to keep the journal's promises. Reads only what INFO says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.errors import StartupError

OLDEST = 7
"""Major version: script flags, which let an answer end when memory is full, came with it."""


def check_server(info: Mapping[str, Any], *, allow_volatile: bool) -> None:
    """Raises StartupError where the server is too old, may evict keys, or forgets at a restart."""
    version = str(info["redis_version"])
    if int(version.partition(".")[0]) < OLDEST:
        raise StartupError(f"queue: Redis >= {OLDEST} or Valkey is needed, this one is {version}")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if int(info.get("maxmemory", 0)) and policy != "noeviction":
        raise StartupError(
            f"queue: Redis may evict answers; set maxmemory-policy noeviction, not {policy}"
        )
    if not int(info.get("aof_enabled", 0)) and not allow_volatile:
        raise StartupError(
            "queue: Redis keeps no append-only file and forgets answers at a restart; set"
            " appendonly yes, or add allow_volatile=1 to the queue's URL"
        )
