"""Work: where one engine looks for work in a queue of several shards.

It looks first in a few shards of its own, by rendezvous hashing of its id, and in others if these
have none. There are so many of its own that a few engines wait in each shard. It looks in the
shards that reported work, and while it is idle in one at a time, in turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from service.queues.contract import ENGINE_SILENCE, slot_of
from service.queues.redis.queue import RedisQueue

OWN = 4
"""Shards in which each of many engines looks for work first."""
FEW, MANY = 3, 8
"""Engines that wait in a shard: each takes one more shard as its own, or one less."""
GUEST_EVERY = 8
"""One in so many claims begins with the shards of others: a shard may have no engine of its own."""
REPORT_EVERY = ENGINE_SILENCE / 2
"""Seconds after which an engine reports to a shard into which it has not looked."""


class Work:
    """In which shards there may be work, and in which order one engine looks into them."""

    def __init__(self, shards: Sequence[RedisQueue], engine: str) -> None:
        self._ranked = ranked(engine, len(shards))
        self._reported = set(range(len(shards)))
        self._listed_at = dict.fromkeys(self._reported, float("-inf"))  # loop time, by shard
        self._claims = 0
        self.num_own = len(shards)
        self.news = asyncio.Event()
        self.due = 0.0  # loop time of the next look, unless woken
        for index, shard in enumerate(shards):
            shard.watch_work(partial(self._report, index))

    def look_everywhere(self) -> None:
        self._reported.update(self._ranked)

    def _report(self, shard: int, message: bytes) -> None:
        if message[:1] == b"s":  # a request was stopped
            return
        self._reported.add(shard)
        self.news.set()

    def looked(self, shard: int, *, exhausted: bool) -> None:
        """The engine has looked into a shard, and found all that is there if it is exhausted."""
        (self._reported.discard if exhausted else self._reported.add)(shard)

    def listed(self, shard: int) -> None:
        """A shard has got the engine's report."""
        self._listed_at[shard] = asyncio.get_running_loop().time()

    def unlisted(self) -> list[int]:
        """The shards that need another report, lest the engine be missing from their lists."""
        earliest = asyncio.get_running_loop().time() - REPORT_EVERY
        return [shard for shard, at in self._listed_at.items() if at <= earliest]

    def waits_with(self, waiting: int) -> None:
        """The engine waits in a shard, in which so many do. Few of them need more shards each."""
        most = len(self._ranked)
        least = min(OWN, most)
        if waiting < FEW:
            self.num_own = min(most, self.num_own + 1)
        elif waiting > MANY:
            self.num_own = max(least, self.num_own - 1)

    def order(self) -> list[tuple[int, bool]]:
        """The shards, and whether there may be work in each: own ones with work, those of others
        with work, and all others; in turns.
        """
        self._claims += 1
        own = _turned(self._ranked[: self.num_own], self._claims)
        others = _turned(self._ranked[self.num_own :], self._claims // GUEST_EVERY)
        turns = others + own if self._claims % GUEST_EVERY == 0 else own + others
        first = [(shard, True) for shard in turns if shard in self._reported]
        return first + [(shard, False) for shard in turns if shard not in self._reported]


def _turned(shards: Sequence[int], by: int) -> list[int]:
    at = by % len(shards) if shards else 0
    return [*shards[at:], *shards[:at]]


def ranked(name: str, count: int) -> list[int]:
    """The shards in an order of this name's own (rendezvous hashing)."""
    return sorted(range(count), key=lambda shard: slot_of(f"{shard} {name}"))
