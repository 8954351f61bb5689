"""Cluster: what this replica knows of the engines that serve its queue. Refreshed each second,
and more often while there is none: the first one to come is wanted at once.

An API replica has no model of its own in memory: how long a prompt may be, what the numeric class
is, how fast tokens come, it knows from what the engines tell of themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from service.errors import Unavailable
from service.messages import ModelCard
from service.queues.contract import Queue, QueueDepth

REFRESH_EVERY = 1.0
REFRESH_EVERY_WITHOUT = 0.1  # seconds, while no engine is there
ENGINES_GONE_AFTER = 5.0  # seconds without any engine before new requests are refused


class ClusterObserver(Protocol):
    """What the cluster tells whoever counts. Called in the event loop."""

    def queue_read(self, depth: QueueDepth, engines: int) -> None:
        """What waits and runs, and how many engines were heard of."""
        ...

    def queue_away(self) -> None:
        """The queue could not be read or written to: nothing is known of it."""
        ...

    def serves(self, card: ModelCard) -> None:
        """What is served here; again where that changed."""
        ...


class Cluster:
    """Follows the queue's list of engines. `card` begins as the replica's own guess."""

    def __init__(
        self,
        queue: Queue,
        card: ModelCard,
        *,
        observer: ClusterObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.card = card
        self._queue = queue
        self._observer = observer
        self._clock = clock
        self._tokens_per_second = 0.0
        self._gone_since: float | None = None  # None: one was there when last looked, if ever
        observer.serves(card)

    @property
    def has_engines(self) -> bool:
        """Whether there may be an engine. A restart of the only one is shorter than the patience.

        That none was there must have been seen: a replica that was held up itself, or could not
        reach the queue, knows nothing of it.
        """
        gone = self._gone_since
        return gone is None or self._clock() - gone < ENGINES_GONE_AFTER

    def tokens_per_second(self) -> float:
        """Of all engines together; 0 where nothing was generated lately."""
        return self._tokens_per_second

    async def refresh(self) -> None:
        """Reads the engines and the queue's depth once. Raises Unavailable, also if the queue can
        be read but takes no writes.
        """
        await self._queue.check()
        engines = await self._queue.engines()
        if engines:
            self._gone_since = None
            self._tokens_per_second = sum(engine.tokens_per_second for engine in engines)
            newest = engines[-1]
            lengths = [engine.max_model_len for engine in engines if engine.max_model_len]
            known = replace(
                self.card,
                numeric_class=newest.numeric_class,
                max_model_len=min([self.card.max_model_len, *lengths]),
            )
            if known != self.card:
                self.card = known
                self._observer.serves(known)
        elif self._gone_since is None:
            self._gone_since = self._clock()
        self._observer.queue_read(await self._queue.depth(), len(engines))

    async def watch(self) -> None:
        """Refreshes for ever; what cannot be read now is read later."""
        while True:
            try:
                await self.refresh()
            except Unavailable:
                self._observer.queue_away()
            gone = self._gone_since is not None
            await asyncio.sleep(REFRESH_EVERY_WITHOUT if gone else REFRESH_EVERY)
