"""Metrics: the observer that feeds every Prometheus series; `series` defines them.

The engine, the worker, the queue, the cluster and the API each have a small observer; `Metrics` is
all of them. It has its own registry: two servers in one process do not mix
their figures. No label value comes from a client.

    accepted = finished over all reasons + waiting + running     summed over all processes

holds while no process was killed: an end is counted once, by the worker that wrote it or, if the
queue wrote it (cancelled, past its deadline), by the process whose call caused that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import generate_latest

from service.api.http.observer import ApiObserver, CallReport
from service.engine.observer import Observer, StepReport
from service.http.connections import ConnectionObserver, Outcome
from service.messages import End, ModelCard
from service.observability.queue_gauges import QueueGauges
from service.observability.series import Series
from service.observability.vllm_names import VllmNames
from service.queues.contract import Claim, QueueDepth
from service.queues.observer import REASON_OF_END, QueueEvent, QueueObserver
from service.worker.observer import WorkerObserver

RATE_WINDOW = 10.0  # seconds


class Metrics(Series, ConnectionObserver, ApiObserver, QueueObserver, WorkerObserver, Observer):
    """All series of one process; `/metrics` returns `render`.

    `on_call` gets the report of each generating call; the request log is written there. `role` and
    `version` are labels of `quire_info`. With `vllm_names` the figures that vLLM has are exported a
    second time, under vLLM's names.
    """

    def __init__(
        self,
        *,
        role: str = "serve",
        version: str = "",
        vllm_names: bool = False,
        on_call: Callable[[CallReport], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.latest: StepReport | None = None
        self._role = role
        self._version = version
        self._on_call = on_call
        self._clock = clock
        self._sampled: deque[tuple[float, int]] = deque(maxlen=2048)  # (time, tokens) per step
        self._queue = QueueGauges(clock)
        self._vllm = VllmNames(self)
        self.registry.register(self._queue)
        if vllm_names:
            self.registry.register(self._vllm)

    def render(self) -> bytes:
        """The text exposition of all series."""
        # Not of a shared queue: each of its engines would count the same requests.
        depth = self._queue.depth if self._role == "serve" else None
        self._vllm.queued = 0 if depth is None else depth.queued_requests
        return generate_latest(self.registry)

    def tokens_per_second(self) -> float:
        """Tokens sampled per second, over the last `RATE_WINDOW`; 0 if there were none."""
        now = self._clock()
        # Iterates over a copy, which is atomic: the engine's thread appends meanwhile.
        recent = [(at, count) for at, count in self._sampled.copy() if now - at <= RATE_WINDOW]
        if len(recent) < 2:
            return 0.0
        return sum(count for _, count in recent) / max(now - recent[0][0], 0.001)

    # --- service.cluster.ClusterObserver --------------------------------------------------
    def queue_read(self, depth: QueueDepth, engines: int) -> None:
        self._queue.read(depth, engines)

    def queue_away(self) -> None:
        self._queue.away()

    def serves(self, card: ModelCard) -> None:
        self.info.clear()
        self.info.labels(self._version, card.id, card.numeric_class, self._role).set(1)
        self._vllm.model = card.id
        self._queue.serves(card)

    # --- service.parts.EngineSide ---------------------------------------------------------
    def has_cache(self, *, block_size: int, num_blocks: int) -> None:
        """The engine's KV cache, before its first step."""
        self.blocks.labels("free").set(num_blocks)
        self._vllm.cache = (block_size, num_blocks)

    # --- service.keys.KeyRing -------------------------------------------------------------
    def keys_reloaded(self, good: bool) -> None:  # noqa: FBT001 - what KeyRing calls
        self.key_reloads.labels("ok" if good else "refused").inc()

    # --- service.http.connections.ConnectionObserver --------------------------------------
    def connections_open(self, port: str, count: int) -> None:
        self.http_connections.labels(port).set(count)

    def connection_limited(self, port: str, outcome: Outcome) -> None:
        self.http_connections_limited.labels(port, outcome.value).inc()

    # --- service.api.http.observer.ApiObserver -------------------------------------------------
    def call_answered(self, status: int) -> None:
        self.http_responses.labels(str(status)).inc()

    def call_accepted(self, requests: int) -> None:
        self.accepted.inc(requests)

    def call_refused(self, reason: str) -> None:
        self.refused.labels(reason).inc()

    def call_unserved(self) -> None:
        self.unserved.inc()

    def call_lost(self, requests: int) -> None:
        self.lost.inc(requests)

    def call_ended(self, report: CallReport) -> None:
        self.duration.observe(report.duration)
        if report.to_first_token is not None:
            self.first_token_time.observe(report.to_first_token)
            if report.completion_tokens > 1:
                rest = report.duration - report.to_first_token
                self.per_token.observe(rest / (report.completion_tokens - 1))
        if self._on_call is not None:
            self._on_call(report)

    # --- service.engine.observer.Observer -------------------------------------------------
    def stepped(self, report: StepReport) -> None:
        self.latest = report
        if report.num_tokens:
            self.steps.inc()
            self.step_time.observe(report.duration)
            self.step_overhead.observe(max(0.0, report.duration - report.run_duration))
            self.step_tokens.observe(report.num_tokens)
            self._sampled.append((self._clock(), report.num_sampled))
        self.running.set(report.running)
        self.waiting.set(report.waiting)
        self.blocks.labels("used").set(report.blocks_used)
        self.blocks.labels("cached").set(report.blocks_cached)
        self.blocks.labels("free").set(report.blocks_free)
        self.prompt_tokens.inc(report.prompt_tokens)
        self.generated_tokens.inc(report.num_sampled)
        self.draft_tokens.inc(report.num_drafts)
        self.accepted_drafts.inc(report.num_accepted)
        self.prefix_hits.inc(report.prefix_hit_tokens)
        self.preemptions.inc(report.preemptions)
        self.wasted(report.recomputed_tokens, "preemption")

    # --- service.worker.observer.WorkerObserver -------------------------------------------
    def claimed(self, claim: Claim) -> None:
        if claim.waited_ms is not None:
            self.queue_wait.observe(claim.waited_ms / 1000)
        if claim.tokens or claim.attempt > 1:
            self.failovers.inc()
            self.wasted(len(claim.request.prompt_ids) + len(claim.tokens), "take_over")

    def ended(self, end: End, seconds: float) -> None:
        self.finished.labels(end.reason.value).inc()
        self.claimed_seconds.observe(seconds)

    def fenced(self) -> None:
        self.fenced_writes.inc()

    def lease_lost(self, count: int) -> None:
        self.lost_leases.inc(count)

    def wasted(self, tokens: int, cause: str) -> None:
        if tokens:
            self.wasted_tokens.labels(cause).inc(tokens)

    def wrote(self, seconds: float) -> None:
        self.write_time.observe(seconds)

    # --- service.queues.observer.QueueObserver --------------------------------------------
    def happened(self, event: QueueEvent, count: int = 1) -> None:
        self.queue_events.labels(event.value).inc(count)
        if event in REASON_OF_END:
            self.finished.labels(REASON_OF_END[event].value).inc(count)
