"""QueueGauges: the queue as it was last read. Without samples where it cannot be read now.

A gauge that stood still while Redis is away would tell an alert or a scaler what is no longer true;
an absent one is something that both of them know how to treat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from service.queues.contract import QueueDepth

STALE_AFTER = 5.0  # seconds; it is read each second


class QueueGauges(Collector):
    """Holds what was read; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._depth: QueueDepth | None = None
        self._engines = 0
        self._read_at: float | None = None  # None: never

    @property
    def depth(self) -> QueueDepth | None:
        """What waits and runs; None where that is not known now."""
        if self._read_at is None or self._clock() - self._read_at > STALE_AFTER:
            return None
        return self._depth

    def read(self, depth: QueueDepth, engines: int) -> None:
        """The queue was reached."""
        self._depth, self._engines, self._read_at = depth, engines, self._clock()

    def away(self) -> None:
        """It was not, or it takes no writes."""
        self._depth, self._read_at = None, self._clock()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """For Prometheus."""
        depth = self.depth
        requests = tokens = running = engines = oldest = stored = reachable = None
        if depth is not None:
            requests, tokens = depth.queued_requests, depth.queued_tokens
            running, engines = depth.running_requests, self._engines
            oldest, stored = depth.oldest_seconds or 0.0, depth.stored_bytes
        if self._read_at is not None:
            reachable = int(depth is not None)
        rows: list[tuple[str, str, float | None]] = [
            ("quire_queue_requests", "Requests waiting, all engines.", requests),
            ("quire_queue_tokens", "Cost in tokens of the waiting requests.", tokens),
            ("quire_queue_running", "Requests held by any engine.", running),
            ("quire_queue_oldest_seconds", "Age of the request that waits longest.", oldest),
            ("quire_queue_stored_bytes", "Stored bytes of requests and their records.", stored),
            ("quire_engines", "Engines heard of within ten seconds.", engines),
            ("quire_queue_reachable", "1 if the queue takes reads and writes, else 0.", reachable),
        ]
        for name, text, value in rows:
            family = GaugeMetricFamily(name, text)
            if value is not None:
                family.add_metric([], value)
            yield family
