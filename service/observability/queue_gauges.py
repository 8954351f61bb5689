"""QueueGauges: gauges of the queue as last read. They have no samples while it cannot be read.

A gauge that kept its value while Redis is unreachable would mislead alerts and autoscalers; both
handle an absent one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from service.messages import ModelCard
from service.queues.contract import ModelDepth, QueueDepth

STALE_AFTER = 5.0  # seconds; it is read each second

# name, help, value
GAUGES: tuple[tuple[str, str, Callable[[QueueDepth], float]], ...] = (
    ("quire_queue_requests", "Requests waiting in the queue.", lambda q: q.queued_requests),
    ("quire_queue_tokens", "Cost of the waiting requests, in tokens.", lambda q: q.queued_tokens),
    ("quire_queue_running", "Requests claimed by any engine.", lambda q: q.running_requests),
    (
        "quire_queue_oldest_seconds",
        "Age of the request that has waited longest.",
        lambda q: q.oldest_seconds or 0.0,
    ),
    (
        "quire_queue_stored_bytes",
        "Stored bytes of requests and their records.",
        lambda q: q.stored_bytes,
    ),
)
# The same by model; zero if nothing waits: a missing sample is an error for autoscalers.
OF_MODEL: tuple[tuple[str, str, Callable[[ModelDepth], float]], ...] = (
    (
        "quire_model_queue_requests",
        "Requests waiting in the queue, by model.",
        lambda model: model.queued_requests,
    ),
    (
        "quire_model_queue_tokens",
        "Cost of the waiting requests in tokens, by model.",
        lambda model: model.queued_tokens,
    ),
    (
        "quire_model_queue_running",
        "Requests claimed by any engine, by model.",
        lambda model: model.running_requests,
    ),
)


class QueueGauges(Collector):
    """`clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._depth: QueueDepth | None = None
        self._engines: Mapping[str, int] = {}  # by model id
        self._models: dict[str, str] = {}  # id -> key
        self._read_at: float | None = None  # None: never

    @property
    def depth(self) -> QueueDepth | None:
        """Waiting and running requests; None if the queue cannot be read now."""
        if self._read_at is None or self._clock() - self._read_at > STALE_AFTER:
            return None
        return self._depth

    def read(self, depth: QueueDepth, engines: Mapping[str, int]) -> None:
        self._depth, self._engines, self._read_at = depth, engines, self._clock()

    def serves(self, card: ModelCard) -> None:
        """Begins the series of a model."""
        self._models[card.id] = card.key

    def away(self) -> None:
        """The queue could not be reached, or takes no writes."""
        self._depth, self._read_at = None, self._clock()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        depth = self.depth
        for name, text, value in GAUGES:
            yield GaugeMetricFamily(name, text, None if depth is None else value(depth))
        for name, text, of_model in OF_MODEL:
            family = GaugeMetricFamily(name, text, labels=["model"])
            for model, key in self._models.items():
                if depth is not None:
                    family.add_metric([model], of_model(depth.by_model.get(key, ModelDepth())))
            yield family
        engines = GaugeMetricFamily(
            "quire_engines",
            "Engines that sent a heartbeat in the last 10 seconds, by model.",
            labels=["model"],
        )
        for model, number in self._engines.items() if depth is not None else ():
            engines.add_metric([model], number)
        yield engines
        yield GaugeMetricFamily(
            "quire_queue_reachable",
            "1 if the queue takes reads and writes, else 0.",
            None if self._read_at is None else int(depth is not None),
        )
