"""Metrics: every Prometheus series, named once, and the observer that feeds them.

The engine, the worker, the queue and the API each know a small observer protocol; `Metrics` is all
of them. It has its own registry: two servers in one process do not mix their figures. No label
comes from what a client sends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.api.observer import CallReport
from service.engine.observer import StepReport
from service.messages import End, FinishReason
from service.queues import Claim, QueueDepth
from service.queues.observer import QueueEvent

# The boundaries that OpenTelemetry's conventions for generative AI servers give.
DURATION_BUCKETS = tuple(0.01 * 2**power for power in range(14))
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
PER_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)  # fmt: skip
STEP_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RATE_WINDOW = 10.0  # seconds
WASTE = (
    "preemption",
    "take_over",
    "cancelled",
    "fenced",
    "lease_lost",
    "journal_lost",
    "storage_full",
)


class Metrics:
    """All series of one process. `render` is what `/metrics` answers.

    `on_call` gets the report of each generating call too: that is where the request log hangs.
    """

    def __init__(
        self,
        *,
        on_call: Callable[[CallReport], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_call = on_call
        self._clock = clock
        self._sampled: deque[tuple[float, int]] = deque(maxlen=2048)  # of the latest steps
        self.latest: StepReport | None = None
        self.registry = CollectorRegistry()
        self._requests()
        self._engine()
        self._journal()
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Creates the series of all label values: a rate misses what first appears as 1."""
        for reason in FinishReason:
            self.finished.labels(reason.value)
        for refusal in ("full", "tenant", "conflict"):
            self.refused.labels(refusal)
        for event in QueueEvent:
            self.queue_events.labels(event.value)
        for cause in WASTE:
            self.wasted_tokens.labels(cause)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _requests(self) -> None:
        self.http_responses = self._counter(
            "quire_http_responses", "HTTP answers by status code.", "status"
        )
        self.accepted = self._counter("quire_requests_accepted", "Requests admitted to the queue.")
        self.refused = self._counter(
            "quire_requests_refused", "Requests refused at admission, by reason.", "reason"
        )
        self.finished = self._counter(
            "quire_requests_finished", "Requests whose end is in the journal, by reason.", "reason"
        )
        self.lost = self._counter(
            "quire_requests_lost", "Admitted requests whose journal vanished. Always 0."
        )
        self.duration = self._histogram(
            "gen_ai_server_request_duration_seconds",
            "From a request's arrival to its last byte.",
            DURATION_BUCKETS,
        )
        self.first_token = self._histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            FIRST_TOKEN_BUCKETS,
        )
        self.per_token = self._histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time of a token after the first, by request.",
            PER_TOKEN_BUCKETS,
        )

    def _engine(self) -> None:
        self.running = self._gauge("quire_sequences_running", "Sequences in the batch.")
        self.waiting = self._gauge("quire_sequences_waiting", "Sequences waiting in the engine.")
        self.blocks = self._gauge("quire_kv_blocks", "KV blocks by state.", "state")
        self.prompt_tokens = self._counter("quire_prompt_tokens", "Prompt tokens computed.")
        self.generated_tokens = self._counter("quire_generated_tokens", "Tokens sampled.")
        self.draft_tokens = self._counter("quire_draft_tokens", "Tokens drafted by look-up.")
        self.accepted_drafts = self._counter(
            "quire_accepted_draft_tokens", "Drafts that the sampler chose too."
        )
        self.prefix_hits = self._counter(
            "quire_prefix_hit_tokens", "Prompt tokens found in the prefix cache."
        )
        self.preemptions = self._counter(
            "quire_preemptions", "Sequences that gave up their blocks to others."
        )
        self.steps = self._counter("quire_steps", "Engine steps.")
        self.step_time = self._histogram(
            "quire_step_duration_seconds", "One engine step, all of it.", STEP_BUCKETS
        )
        self.step_overhead = self._histogram(
            "quire_step_overhead_seconds", "One engine step outside the network.", STEP_BUCKETS
        )
        self.step_tokens = self._histogram(
            "quire_step_tokens", "Tokens that a step computes.", BATCH_BUCKETS
        )
        self.wasted_tokens = self._counter(
            "quire_wasted_tokens", "Tokens computed again or for nothing, by cause.", "cause"
        )

    def _journal(self) -> None:
        self.queued_requests = self._gauge("quire_queue_requests", "Requests waiting, all engines.")
        self.queued_tokens = self._gauge(
            "quire_queue_tokens", "Cost in tokens of the waiting requests."
        )
        self.claimed_requests = self._gauge("quire_queue_running", "Requests held by any engine.")
        self.take_overs = self._counter(
            "quire_take_overs", "Requests continued here after another engine died or left."
        )
        self.fenced_writes = self._counter(
            "quire_fenced_writes", "Writes that the queue refused: the request was another's."
        )
        self.queue_events = self._counter(
            "quire_queue_events", "What this process's side of the queue met with.", "event"
        )
        self.lost_leases = self._counter("quire_lost_leases", "Leases that ran out here.")
        self.write_time = self._histogram(
            "quire_journal_write_seconds", "One write of a step's records.", STEP_BUCKETS
        )
        self.claimed_seconds = self._histogram(
            "quire_engine_seconds", "From a request's claim to its end.", DURATION_BUCKETS
        )

    def render(self) -> bytes:
        """The text exposition of all series."""
        return generate_latest(self.registry)

    def tokens_per_second(self) -> float:
        """Tokens sampled lately, each second; 0 where nothing was."""
        now = self._clock()
        recent = [(at, count) for at, count in self._sampled if now - at <= RATE_WINDOW]
        if len(recent) < 2:
            return 0.0
        return sum(count for _, count in recent) / max(now - recent[0][0], 0.001)

    def set_depth(self, depth: QueueDepth) -> None:
        """What waits and runs over the whole cluster."""
        self.queued_requests.set(depth.queued_requests)
        self.queued_tokens.set(depth.queued_tokens)
        self.claimed_requests.set(depth.running_requests)

    # --- service.api.observer.ApiObserver -------------------------------------------------
    def call_answered(self, status: int) -> None:
        """Counts an HTTP answer."""
        self.http_responses.labels(str(status)).inc()

    def call_accepted(self, requests: int) -> None:
        """Counts admitted requests."""
        self.accepted.inc(requests)

    def call_refused(self, reason: str) -> None:
        """Counts a call that the queue did not admit."""
        self.refused.labels(reason).inc()

    def call_lost(self, requests: int) -> None:
        """Counts what must never happen."""
        self.lost.inc(requests)

    def call_ended(self, report: CallReport) -> None:
        """Measures a generating call as its client saw it."""
        self.duration.observe(report.duration)
        if report.to_first_token is not None:
            self.first_token.observe(report.to_first_token)
            if report.completion_tokens > 1:
                rest = report.duration - report.to_first_token
                self.per_token.observe(rest / (report.completion_tokens - 1))
        if self._on_call is not None:
            self._on_call(report)

    # --- service.engine.observer.Observer -------------------------------------------------
    def stepped(self, report: StepReport) -> None:
        """Counts one engine step, and what is held after it."""
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
        if report.recomputed_tokens:
            self.wasted_tokens.labels("preemption").inc(report.recomputed_tokens)

    # --- service.worker.WorkerObserver ----------------------------------------------------
    def claimed(self, claim: Claim) -> None:
        """Counts a take-over, and what it computes again."""
        if claim.tokens or claim.attempt > 1:
            self.take_overs.inc()
            again = len(claim.request.prompt_ids) + len(claim.tokens)
            self.wasted_tokens.labels("take_over").inc(again)

    def ended(self, end: End, seconds: float) -> None:
        """Counts an end."""
        self.finished.labels(end.reason.value).inc()
        self.claimed_seconds.observe(seconds)

    def fenced(self) -> None:
        """Counts a refused write."""
        self.fenced_writes.inc()

    def lease_lost(self, count: int) -> None:
        """Counts leases that ran out."""
        self.lost_leases.inc(count)

    def wasted(self, tokens: int, cause: str) -> None:
        """Adds to the ledger of waste."""
        if tokens:
            self.wasted_tokens.labels(cause).inc(tokens)

    def wrote(self, seconds: float) -> None:
        """Measures one write to the journal."""
        self.write_time.observe(seconds)

    # --- service.queues.observer.QueueObserver --------------------------------------------
    def happened(self, event: QueueEvent, count: int = 1) -> None:
        """Counts what the queue met with."""
        self.queue_events.labels(event.value).inc(count)
