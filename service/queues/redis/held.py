"""HeldPrefixes: announces what the engines of this process hold: what changed."""

from __future__ import annotations

import asyncio

from service.queues.contract import HELD_FOR
from service.queues.redis.connection import RedisClient
from service.queues.redis.keys import milliseconds

REFRESH = HELD_FOR / 3
"""Seconds after which all is sent again: the server forgets it, and may have lost it."""


class HeldPrefixes:
    """In one shard: `key` is its admission key."""

    def __init__(self, client: RedisClient, key: str) -> None:
        self._client = client
        self._key = key
        self._sent: dict[str, frozenset[str]] = {}  # by engine
        self._refresh_at: dict[str, float] = {}  # loop time, by engine

    async def announce(self, engine: str, prefixes: frozenset[str]) -> None:
        """Sends nothing if nothing changed. Raises Unavailable."""
        now = asyncio.get_running_loop().time()
        sent = self._sent.get(engine, frozenset())
        is_due = now >= self._refresh_at.get(engine, now)
        added = prefixes if is_due else prefixes - sent
        if not (added or sent - prefixes):
            return
        self._refresh_at[engine] = now  # until it succeeds
        command = self._client.script(
            "hold",
            self._key,
            engine=engine,
            added=sorted(added),
            removed=sorted(sent - prefixes),
            ttl=milliseconds(HELD_FOR),
        )
        await self._client.run([command])
        self._sent[engine] = prefixes
        self._refresh_at[engine] = now + REFRESH
