"""Series: every Prometheus series of Quire but those of the queue, named once. It feeds none.

`metrics_queue` has the gauges of the queue, which are absent where nobody knows them, and
`metrics_vllm` the same figures under vLLM's names.
"""

from __future__ import annotations

from itertools import product

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from service.api.observer import BUSY
from service.http.connections import Outcome
from service.messages import FinishReason
from service.queues.contract import SubmitStatus
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
# A request may wait while an engine is started, and for an hour at most.
WAIT_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0, 600.0, 1800.0, 3600.0,
)  # fmt: skip
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
KEY_RELOADS = ("ok", "refused")
PORTS = ("api", "admin")
WASTE = (
    "preemption",
    "take_over",
    "cancelled",
    "fenced",
    "lease_lost",
    "journal_lost",
    "storage_full",
)


class Series:
    """The series of one process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests()
        self._engine()
        self._journal()
        self._process()
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Creates the series of all label values: a rate misses what first appears as 1."""
        for reason in FinishReason:
            self.finished.labels(reason.value)
        refusals = {status.value for status in SubmitStatus} - {
            SubmitStatus.OK,
            SubmitStatus.EXISTS,
        }
        for refusal in refusals | {BUSY}:
            self.refused.labels(refusal)
        for event in QueueEvent:
            self.queue_events.labels(event.value)
        for port, outcome in product(PORTS, Outcome):
            self.http_connections.labels(port)
            self.http_connections_limited.labels(port, outcome.value)
        for result in KEY_RELOADS:
            self.key_reloads.labels(result)
        for cause in WASTE:
            self.wasted_tokens.labels(cause)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _requests(self) -> None:
        self.http_connections = self._gauge(
            "quire_http_connections", "Open connections by port.", "port"
        )
        self.http_connections_limited = self._counter(
            "quire_http_connections_limited",
            "Connections closed while idle, or refused, because of a limit on connections.",
            "port",
            "outcome",
        )
        self.http_responses = self._counter(
            "quire_http_responses", "HTTP answers by status code.", "status"
        )
        self.accepted = self._counter("quire_requests_accepted", "Requests admitted to the queue.")
        self.refused = self._counter(
            "quire_requests_refused", "Calls refused by a limit, by reason.", "reason"
        )
        self.unserved = self._counter(
            "quire_calls_unserved", "Calls refused because no engine was there."
        )
        self.key_reloads = self._counter(
            "quire_key_reloads", "Changes of the keys file: taken over, or refused.", "result"
        )
        self.accepts_without_engines = self._gauge(
            "quire_accepts_without_engines", "1 where calls are taken while no engine is there."
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
        self.first_token_time = self._histogram(
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
        self.queue_wait = self._histogram(
            "quire_queue_wait_seconds",
            "From a request's submission to its first claim.",
            WAIT_BUCKETS,
        )
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

    def _process(self) -> None:
        """Memory, CPU, files, garbage collections; and what this process is."""
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.info = self._gauge(
            "quire_info",
            "What this process is: always 1.",
            *("version", "model", "numeric_class", "role"),
        )
