"""Cluster: what this replica knows about the engines of its model.

An API replica has not loaded the model: it learns the context length, the numeric class and the
speed from what the engines report. It reads that every second, and more often while there is no
engine, so that it serves soon after the first one starts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from service.errors import Unavailable
from service.messages import ModelCard
from service.queues.contract import Queue, QueueDepth

log = logging.getLogger(__name__)

REFRESH_INTERVAL = 1.0  # seconds
REFRESH_INTERVAL_WITHOUT_ENGINES = 0.1
ENGINES_GONE_AFTER = 5.0  # seconds without an engine after which new requests are refused


class ClusterObserver(Protocol):
    """For metrics. Called in the event loop."""

    def queue_read(self, depth: QueueDepth, engines: int) -> None:
        """The queue was read: its depth, and the number of engines of this model."""
        ...

    def queue_away(self) -> None:
        """The queue could not be read, or takes no writes."""
        ...

    def serves(self, card: ModelCard) -> None:
        """The model that is served; called again if its card changed."""
        ...


class Cluster:
    """Follows the queue's list of engines. `card` starts as the replica's own guess."""

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
        self._gone_since: float | None = None  # None: one was there at the last refresh
        observer.serves(card)

    @property
    def has_engines(self) -> bool:
        """Whether there may be an engine: false once none was seen for `ENGINES_GONE_AFTER`, which
        the restart of an engine does not take.

        Only refreshes that succeeded count: while the queue is away, or this process was stopped,
        nothing is known about the engines.
        """
        gone = self._gone_since
        return gone is None or self._clock() - gone < ENGINES_GONE_AFTER

    def tokens_per_second(self) -> float:
        """Sum over the engines; 0 if nothing was generated lately."""
        return self._tokens_per_second

    async def refresh(self) -> None:
        """Reads the engines and the queue's depth. Raises Unavailable if the queue cannot be read
        or takes no writes.
        """
        await self._queue.check()
        everyone = await self._queue.engines()
        engines = [info for info in everyone if info.serves(self.card)]
        if engines:
            self._gone_since = None
            self._tokens_per_second = sum(engine.tokens_per_second for engine in engines)
            newest = engines[-1]
            lengths = [engine.max_model_len for engine in engines if engine.max_model_len]
            known = replace(
                self.card,
                numeric_class=newest.numeric_class,
                max_model_len=min([self.card.max_model_len, *lengths]),
                block_size=newest.block_size if len(engines) > 1 else 0,
            )
            if known != self.card:
                self.card = known
                self._observer.serves(known)
        elif self._gone_since is None:
            self._gone_since = self._clock()
            if everyone:
                log.warning(
                    "none of the queue's %d engines serves %s: API and engine replicas need the "
                    "same model and model_name",
                    len(everyone),
                    self.card.id,
                )
        self._observer.queue_read(await self._queue.depth(), len(engines))

    async def watch(self) -> None:
        """Refreshes until cancelled; retries while the queue is away."""
        while True:
            try:
                await self.refresh()
            except Unavailable:
                self._observer.queue_away()
            gone = self._gone_since is not None
            await asyncio.sleep(REFRESH_INTERVAL_WITHOUT_ENGINES if gone else REFRESH_INTERVAL)
