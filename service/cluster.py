"""Cluster: what this replica knows of the engines that serve its queue. Refreshed each second.

An API replica has no model of its own in memory: how long a prompt may be, what the numeric class
is, how fast tokens come, it knows from what the engines tell of themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from service.errors import Unavailable
from service.messages import ModelCard
from service.queues import Queue, QueueDepth

REFRESH_EVERY = 1.0
ENGINES_GONE_AFTER = 5.0  # seconds without any engine before new requests are refused


class Cluster:
    """Follows the queue's list of engines. `card` begins as the replica's own guess."""

    def __init__(
        self,
        queue: Queue,
        card: ModelCard,
        *,
        on_depth: Callable[[QueueDepth], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.card = card
        self._queue = queue
        self._on_depth = on_depth
        self._clock = clock
        self._tokens_per_second = 0.0
        self._last_engine = clock()

    @property
    def has_engines(self) -> bool:
        """Whether an engine was heard of lately. A restart is shorter than what `lately` is."""
        return self._clock() - self._last_engine < ENGINES_GONE_AFTER

    def tokens_per_second(self) -> float:
        """Of all engines together; 0 where nothing was generated lately."""
        return self._tokens_per_second

    async def refresh(self) -> None:
        """Reads the engines and the queue's depth once. Raises Unavailable."""
        engines = await self._queue.engines()
        if engines:
            self._last_engine = self._clock()
            self._tokens_per_second = sum(engine.tokens_per_second for engine in engines)
            newest = engines[-1]
            lengths = [engine.max_model_len for engine in engines if engine.max_model_len]
            self.card = replace(
                self.card,
                numeric_class=newest.numeric_class,
                max_model_len=min([self.card.max_model_len, *lengths]),
            )
        self._on_depth(await self._queue.depth())

    async def watch(self) -> None:
        """Refreshes for ever; what cannot be read now is read later."""
        while True:
            with suppress(Unavailable):
                await self.refresh()
            await asyncio.sleep(REFRESH_EVERY)
