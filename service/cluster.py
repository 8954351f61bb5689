"""Cluster: what this replica knows about the engines of its models.

An API replica has loaded no network: it learns the context length, the numeric class and the speed
from what the engines report. It reads that every second, and more often while there is no engine of
any of its models, so that it serves soon after the first one starts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from service.errors import Unavailable
from service.messages import ModelCard
from service.queues.contract import EngineGroup, Queue, QueueDepth

log = logging.getLogger(__name__)

REFRESH_INTERVAL = 1.0  # seconds
REFRESH_INTERVAL_WITHOUT_ENGINES = 0.1
ENGINES_GONE_AFTER = 5.0  # seconds without an engine after which new requests are refused


class ClusterObserver(Protocol):
    """For metrics. Called in the event loop."""

    def queue_read(self, depth: QueueDepth, engines: Mapping[str, int]) -> None:
        """The queue was read: its depth, and the number of engines by model."""
        ...

    def queue_away(self) -> None:
        """The queue could not be read, or takes no writes."""
        ...

    def serves(self, card: ModelCard) -> None:
        """A model that is served; called again if its card changed."""
        ...


class ModelEngines:
    """The engines of one model. `card` starts as the replica's own guess."""

    def __init__(self, card: ModelCard, *, clock: Callable[[], float]) -> None:
        self.card = card
        self.tokens_per_second = 0.0  # sum over the engines; 0 if nothing was generated lately
        self._clock = clock
        self._gone_since: float | None = None  # None: one was there at the last refresh

    @property
    def seen(self) -> bool:
        """Whether the last refresh found one, or there was none yet."""
        return self._gone_since is None

    @property
    def available(self) -> bool:
        """Whether there may be an engine: false once none was seen for `ENGINES_GONE_AFTER`, which
        the restart of an engine does not take.

        Only refreshes that succeeded count: while the queue is away, or this process was stopped,
        nothing is known about the engines.
        """
        gone = self._gone_since
        return gone is None or self._clock() - gone < ENGINES_GONE_AFTER

    def read(self, everyone: Sequence[EngineGroup]) -> int:
        """Updates itself from the groups of all engines; returns how many are of this model."""
        groups = [group for group in everyone if group.info.serves(self.card)]
        count = sum(group.engines for group in groups)
        if groups:
            self._gone_since = None
            self.tokens_per_second = sum(group.tokens_per_second for group in groups)
            lengths = [group.info.max_model_len for group in groups if group.info.max_model_len]
            most = max(groups, key=lambda group: (group.engines, group.info.numeric_class)).info
            self.card = replace(
                self.card.of_class(most.numeric_class),
                max_model_len=min([self.card.max_model_len, *lengths]),
                block_size=most.block_size if count > 1 else 0,
            )
        elif self._gone_since is None:
            self._gone_since = self._clock()
            if everyone:
                log.warning(
                    "none of the queue's %d engines serves %s: API and engine replicas need the "
                    "same model under the same name",
                    sum(group.engines for group in everyone),
                    self.card.id,
                )
        return count


class Cluster:
    """Follows the queue's registry of engines. `models` are the served models by their names."""

    def __init__(
        self,
        queue: Queue,
        cards: Sequence[ModelCard],
        *,
        observer: ClusterObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.models = {card.id: ModelEngines(card, clock=clock) for card in cards}
        self._queue = queue
        self._observer = observer
        for card in cards:
            observer.serves(card)

    async def refresh(self) -> None:
        """Reads the engines and the queue's depth. Raises Unavailable if the queue cannot be read
        or takes no writes.
        """
        await self._queue.check()
        everyone = await self._queue.engine_groups()
        counts = {}
        for name, model in self.models.items():
            before = model.card
            counts[name] = model.read(everyone)
            if model.card != before:
                self._observer.serves(model.card)
        self._observer.queue_read(await self._queue.depth(), counts)

    async def watch(self) -> None:
        """Refreshes until cancelled; retries while the queue is away."""
        while True:
            try:
                await self.refresh()
            except Unavailable:
                self._observer.queue_away()
            seen = any(model.seen for model in self.models.values())
            await asyncio.sleep(REFRESH_INTERVAL if seen else REFRESH_INTERVAL_WITHOUT_ENGINES)
