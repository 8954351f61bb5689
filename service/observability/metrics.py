"""Metrics: the observers that feed every Prometheus series; `series` defines them.

The engine, the worker, the queue, the cluster and the API each have a small observer; `Metrics` is
those of a process, `ModelMetrics` those of one model's engine. A process has its own registry: two
servers in one do not mix their figures. No label value comes from a client.

    accepted = finished over all reasons + waiting + running     summed over all processes

holds while no process was killed: an end is counted once, by the worker that wrote it or, if the
queue wrote it (cancelled, past its deadline), by the process whose call caused that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from prometheus_client import generate_latest

from service.api.http.observer import ApiObserver, CallReport
from service.engine.observer import Observer, StepReport
from service.http.connections import ConnectionObserver, Outcome
from service.messages import End, ModelCard
from service.observability.queue_gauges import QueueGauges
from service.observability.series import BLOCKS, Series
from service.observability.vllm_names import VllmNames
from service.queues.contract import Claim, ModelDepth, QueueDepth
from service.queues.observer import REASON_OF_END, QueueEvent, QueueObserver
from service.worker.observer import WorkerObserver

RATE_WINDOW = 10.0  # seconds
MAX_TENANTS = 100  # with series of their own, per process
OTHER_TENANTS = "(other)"  # no tenant has this name


class Metrics(Series, ConnectionObserver, ApiObserver, QueueObserver):
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
        self._role = role
        self._version = version
        self._on_call = on_call
        self._clock = clock
        self._cards: dict[str, ModelCard] = {}
        self._tenants: set[str] = set()
        self._models: dict[str, ModelMetrics] = {}
        self._queue = QueueGauges(clock)
        self._vllm = VllmNames(self)
        self.registry.register(self._queue)
        if vllm_names:
            self.registry.register(self._vllm)

    def render(self) -> bytes:
        """The text exposition of all series."""
        # Not of a shared queue: each of its engines would count the same requests.
        depth = self._queue.depth if self._role == "serve" else None
        self._vllm.queued = {
            card.id: 0
            if depth is None
            else depth.by_model.get(card.key, ModelDepth()).queued_requests
            for card in self._cards.values()
        }
        return generate_latest(self.registry)

    def of_model(self, model: str) -> ModelMetrics:
        """The observer of a model's engine and worker, and what it has seen. One per model."""
        if model not in self._models:
            self.begin_model(model)
            self._models[model] = ModelMetrics(self, model, vllm=self._vllm, clock=self._clock)
        return self._models[model]

    # --- service.cluster.ClusterObserver --------------------------------------------------
    def queue_read(self, depth: QueueDepth, engines: Mapping[str, int]) -> None:
        self._queue.read(depth, engines)

    def queue_away(self) -> None:
        self._queue.away()

    def serves(self, card: ModelCard) -> None:
        self._cards[card.id] = card
        self.of_model(card.id)
        self.info.clear()
        for each in self._cards.values():
            self.info.labels(self._version, each.id, each.numeric_class, self._role).set(1)
        self._queue.serves(card)

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

    def call_accepted(self, requests: int, model: str) -> None:
        self.accepted.labels(model).inc(requests)

    def call_refused(self, reason: str) -> None:
        self.refused.labels(reason).inc()

    def call_unserved(self, model: str) -> None:
        self.unserved.labels(model).inc()

    def call_lost(self, requests: int, model: str) -> None:
        self.lost.labels(model).inc(requests)

    def call_ended(self, report: CallReport) -> None:
        self.duration.labels(report.model).observe(report.duration)
        if report.to_first_token is not None:
            self.first_token_time.labels(report.model).observe(report.to_first_token)
            if report.completion_tokens > 1:
                rest = report.duration - report.to_first_token
                self.per_token.labels(report.model).observe(rest / (report.completion_tokens - 1))
        if not report.repeats:
            self._count_tenant(report)
        if self._on_call is not None:
            self._on_call(report)

    def _count_tenant(self, report: CallReport) -> None:
        if report.tenant in self._tenants or len(self._tenants) < MAX_TENANTS:
            self._tenants.add(report.tenant)
            tenant = report.tenant
        else:
            tenant = OTHER_TENANTS
        for kind, tokens in (
            ("prompt", report.prompt_tokens),
            ("cached", report.cached_tokens),
            ("generated", report.completion_tokens),
        ):
            self.tenant_tokens.labels(tenant, kind).inc(tokens)

    # --- service.queues.observer.QueueObserver --------------------------------------------
    def happened(self, event: QueueEvent, count: int = 1) -> None:
        self.queue_events.labels(event.value).inc(count)
        if event in REASON_OF_END:
            model = next(iter(self._cards)) if len(self._cards) == 1 else ""
            self.finished.labels(model, REASON_OF_END[event].value).inc(count)


class ModelMetrics(WorkerObserver, Observer):
    """Observes the engine and the worker of one model. `latest` is its newest step."""

    def __init__(
        self, series: Series, model: str, *, vllm: VllmNames, clock: Callable[[], float]
    ) -> None:
        self.latest: StepReport | None = None
        self._series = series
        self._model = model
        self._vllm = vllm
        self._clock = clock
        self._served: deque[tuple[float, int]] = deque(maxlen=2048)  # (time, tokens) per step
        self._steps = series.steps.labels(model)
        self._step_time = series.step_time.labels(model)
        self._step_overhead = series.step_overhead.labels(model)
        self._step_tokens = series.step_tokens.labels(model)
        self._running = series.running.labels(model)
        self._waiting = series.waiting.labels(model)
        self._prompt_tokens = series.prompt_tokens.labels(model)
        self._generated_tokens = series.generated_tokens.labels(model)
        self._encoded_inputs = series.encoded_inputs.labels(model)
        self._draft_tokens = series.draft_tokens.labels(model)
        self._accepted_drafts = series.accepted_drafts.labels(model)
        self._prefix_hits = series.prefix_hits.labels(model)
        self._preemptions = series.preemptions.labels(model)
        self._queue_wait = series.queue_wait.labels(model)
        self._failovers = series.failovers.labels(model)
        self._claimed_seconds = series.claimed_seconds.labels(model)
        self._blocks = {state: series.blocks.labels(model, state) for state in BLOCKS}

    def has_cache(self, *, block_size: int, num_blocks: int) -> None:
        """The engine's KV cache, before its first step."""
        self._blocks["free"].set(num_blocks)
        self._vllm.cache[self._model] = (block_size, num_blocks)

    def tokens_per_second(self) -> float:
        """Tokens sampled or encoded per second, in the last `RATE_WINDOW`; 0 if none were."""
        now = self._clock()
        # Iterates over a copy, which is atomic: the engine's thread appends meanwhile.
        recent = [(at, count) for at, count in self._served.copy() if now - at <= RATE_WINDOW]
        if len(recent) < 2:
            return 0.0
        return sum(count for _, count in recent) / max(now - recent[0][0], 0.001)

    def stepped(self, report: StepReport) -> None:
        self.latest = report
        if report.num_tokens:
            self._steps.inc()
            self._step_time.observe(report.duration)
            self._step_overhead.observe(max(0.0, report.duration - report.run_duration))
            self._step_tokens.observe(report.num_tokens)
            served = report.num_tokens if report.num_encoded else report.num_sampled
            self._served.append((self._clock(), served))
        self._running.set(report.running)
        self._waiting.set(report.waiting)
        self._blocks["used"].set(report.blocks_used)
        self._blocks["cached"].set(report.blocks_cached)
        self._blocks["free"].set(report.blocks_free)
        self._prompt_tokens.inc(report.prompt_tokens)
        self._generated_tokens.inc(report.num_sampled)
        self._encoded_inputs.inc(report.num_encoded)
        self._draft_tokens.inc(report.num_drafts)
        self._accepted_drafts.inc(report.num_accepted)
        self._prefix_hits.inc(report.prefix_hit_tokens)
        self._preemptions.inc(report.preemptions)
        self.wasted(report.recomputed_tokens, "preemption")
        self.wasted(report.num_skipped, "grammar")

    def claimed(self, claim: Claim) -> None:
        if claim.waited_ms is not None:
            self._queue_wait.observe(claim.waited_ms / 1000)
        if claim.tokens or claim.attempt > 1:
            self._failovers.inc()
            self.wasted(len(claim.request.prompt_ids) + len(claim.tokens), "take_over")

    def ended(self, end: End, seconds: float) -> None:
        self._series.finished.labels(self._model, end.reason.value).inc()
        self._claimed_seconds.observe(seconds)

    def fenced(self) -> None:
        self._series.fenced_writes.inc()

    def lease_lost(self, count: int) -> None:
        self._series.lost_leases.inc(count)

    def wasted(self, tokens: int, cause: str) -> None:
        if tokens:
            self._series.wasted_tokens.labels(self._model, cause).inc(tokens)

    def wrote(self, seconds: float) -> None:
        self._series.write_time.observe(seconds)
