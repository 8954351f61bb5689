"""Lender: what one shard of a sharded queue uses of its shares of limits, and lends of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.queues.redis.connection import Command, RedisClient
from service.queues.redis.keys import ShardKeys


class Lender:
    """`window`: the resume window in ms, for kept submissions that are evicted."""

    def __init__(self, client: RedisClient, keys: ShardKeys, *, window: int) -> None:
        self._client = client
        self._keys = keys
        self._window = window

    async def levels(self, fields: Sequence[tuple[bool, str, str]]) -> list[tuple[int, int]]:
        """Of counters (whether bytes, field, name of its loans): what is used, and what is lent."""
        commands: list[Command] = []
        for stored, field, name in fields:
            commands.append(("HGET", self._keys.stored if stored else self._keys.admission, field))
            commands.append(("HGET", self._keys.lent, name))
        replies = [int(reply or 0) for reply in await self._client.run(commands)]
        return list(zip(replies[::2], replies[1::2], strict=True))

    async def loans(self) -> dict[str, int]:
        """What is lent, by the name of the limit; negative if it is borrowed."""
        (table,) = await self._client.run([("HGETALL", self._keys.lent)])
        return {name.decode(): int(amount) for name, amount in table.items()}

    async def metered(self, key: str) -> float:
        """Seconds until the meter of a key's tokens is back to zero."""
        text, now = await self._client.run([("GET", self._keys.tokens_of(key)), ("TIME",)])
        now_ms = int(now[0]) * 1000 + int(now[1]) // 1000  # as the scripts count
        return max(0.0, float(text or 0) - now_ms) / 1000

    async def lend(
        self,
        *,
        nonce: str,
        limits: Sequence[Mapping[str, Any]] = (),
        meters: Sequence[Mapping[str, Any]] = (),
        evict: str | None = None,
    ) -> list[bytes]:
        """What was lent of each; see `lend.lua`. `evict`: the tenant that makes room."""
        command = self._client.script(
            "lend",
            self._keys.admission,
            nonce=nonce,
            limits=limits,
            meters=meters,
            tenant=evict,
            window=self._window,
        )
        (reply,) = await self._client.run([command])
        return list(reply)
