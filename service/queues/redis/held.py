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

    def has_news(self, engine: str, prefixes: frozenset[str]) -> bool:
        """Whether anything changed, or all is to be sent again."""
        sent = self._sent.get(engine, frozenset())
        return prefixes != sent or (bool(prefixes) and self._is_due(engine))

    def _is_due(self, engine: str) -> bool:
        now = asyncio.get_running_loop().time()
        return now >= self._refresh_at.get(engine, now)

    async def announce(self, engine: str, prefixes: frozenset[str]) -> None:
        """Sends what changed. Raises Unavailable."""
        now = asyncio.get_running_loop().time()
        sent = self._sent.get(engine, frozenset())
        added = prefixes if self._is_due(engine) else prefixes - sent
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
