"""Series: every Prometheus series of a process, defined once; `Metrics` feeds them.

The gauges of the queue are in `queue_gauges`: they are absent while the queue cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from service.api.http.observer import BUSY
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

REFUSALS = {*SubmitStatus, BUSY} - {SubmitStatus.OK, SubmitStatus.EXISTS}
PORTS = ("api", "admin")
BLOCKS = ("used", "cached", "free")
WASTE = (
    "preemption", "grammar", "take_over", "cancelled", "fenced", "lease_lost", "journal_lost",
    "storage_full",
)  # fmt: skip

_Labelled = TypeVar("_Labelled", Counter, Gauge)


class Series:
    """The series of one process, in a registry of its own. Those made by `_model_counter`,
    `_model_gauge` and `_model_histogram` have the label `model`; they begin with `begin_model`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._by_model: list[tuple[Counter | Gauge | Histogram, dict[str, Iterable[str]]]] = []
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._process_and_http()
        self._requests()
        self._engine()
        self._journal()

    def _counter(self, name: str, text: str, **labels: Iterable[str]) -> Counter:
        return _with_values(Counter(name, text, labels, registry=self.registry), labels)

    def _gauge(self, name: str, text: str, **labels: Iterable[str]) -> Gauge:
        return _with_values(Gauge(name, text, labels, registry=self.registry), labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _model_counter(self, name: str, text: str, **labels: Iterable[str]) -> Counter:
        metric = Counter(name, text, ("model", *labels), registry=self.registry)
        self._by_model.append((metric, labels))
        return metric

    def _model_gauge(self, name: str, text: str, **labels: Iterable[str]) -> Gauge:
        metric = Gauge(name, text, ("model", *labels), registry=self.registry)
        self._by_model.append((metric, labels))
        return metric

    def _model_histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, text, ("model",), buckets=buckets, registry=self.registry)
        self._by_model.append((metric, {}))
        return metric

    def begin_model(self, model: str) -> None:
        """Creates the series of a model, for all known values of their other labels."""
        for metric, labels in self._by_model:
            for values in product(*labels.values()):
                metric.labels(model, *values)

    def _process_and_http(self) -> None:
        counter, gauge = self._counter, self._gauge
        self.info = gauge(
            "quire_info",
            "Version, model, numeric class and role of this process; always 1.",
            **dict.fromkeys(("version", "model", "numeric_class", "role"), ()),
        )
        self.http_connections = gauge(
            "quire_http_connections", "Open connections by port.", port=PORTS
        )
        self.http_connections_limited = counter(
            "quire_http_connections_limited",
            "Connections closed while idle, or refused, because of a connection limit.",
            port=PORTS,
            outcome=Outcome,
        )
        self.http_responses = counter(
            "quire_http_responses", "HTTP responses by status code.", status=()
        )
        self.key_reloads = counter(
            "quire_key_reloads",
            "Changes of the keys file: loaded (ok) or refused.",
            result=("ok", "refused"),
        )

    def _requests(self) -> None:
        counter, histogram = self._model_counter, self._model_histogram
        self.accepted = counter("quire_requests_accepted", "Requests admitted to the queue.")
        self.refused = self._counter(
            "quire_requests_refused", "Calls refused by a limit, by reason.", reason=REFUSALS
        )
        self.unserved = counter(
            "quire_calls_unserved", "Calls refused because no engine of the model was available."
        )
        self.accepts_without_engines = self._gauge(
            "quire_accepts_without_engines", "1 if calls are accepted while no engine is available."
        )
        self.finished = counter(
            "quire_requests_finished",
            "Requests whose end is in the journal, by finish reason.",
            reason=FinishReason,
        )
        self.tenant_tokens = self._counter(
            "quire_tenant_tokens",
            "Tokens of calls that ended, by tenant and kind; the first 100 tenants by name.",
            tenant=(),
            kind=("prompt", "cached", "generated"),
        )
        self.lost = counter(
            "quire_requests_lost", "Admitted requests whose journal vanished. Must be 0."
        )
        self.duration = histogram(
            "gen_ai_server_request_duration_seconds",
            "Time from a request's arrival to its last byte.",
            DURATION_BUCKETS,
        )
        self.first_token_time = histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            FIRST_TOKEN_BUCKETS,
        )
        self.per_token = histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time per output token after the first, by request.",
            PER_TOKEN_BUCKETS,
        )

    def _engine(self) -> None:
        counter, gauge, histogram = self._model_counter, self._model_gauge, self._model_histogram
        self.running = gauge("quire_sequences_running", "Sequences in the batch.")
        self.waiting = gauge("quire_sequences_waiting", "Sequences waiting in the engine.")
        self.blocks = gauge("quire_kv_blocks", "KV blocks by state.", state=BLOCKS)
        self.prompt_tokens = counter("quire_prompt_tokens", "Prompt tokens computed.")
        self.generated_tokens = counter("quire_generated_tokens", "Output tokens generated.")
        self.encoded_inputs = counter("quire_encoded_inputs", "Inputs encoded.")
        self.draft_tokens = counter("quire_draft_tokens", "Draft tokens computed.")
        self.accepted_drafts = counter("quire_accepted_draft_tokens", "Draft tokens accepted.")
        self.prefix_hits = counter(
            "quire_prefix_hit_tokens", "Prompt tokens found in the prefix cache."
        )
        self.preemptions = counter(
            "quire_preemptions", "Preemptions of running sequences in favour of others."
        )
        self.steps = counter("quire_steps", "Engine steps.")
        self.step_time = histogram(
            "quire_step_duration_seconds", "Duration of an engine step.", STEP_BUCKETS
        )
        self.step_overhead = histogram(
            "quire_step_overhead_seconds",
            "Duration of an engine step outside the network.",
            STEP_BUCKETS,
        )
        self.step_tokens = histogram(
            "quire_step_tokens", "Tokens computed per engine step.", BATCH_BUCKETS
        )
        self.wasted_tokens = counter(
            "quire_wasted_tokens", "Tokens computed again or discarded, by cause.", cause=WASTE
        )

    def _journal(self) -> None:
        counter, histogram = self._counter, self._histogram
        self.queue_wait = self._model_histogram(
            "quire_queue_wait_seconds",
            "Time from a request's submission to its first claim.",
            WAIT_BUCKETS,
        )
        self.failovers = self._model_counter(
            "quire_take_overs", "Requests continued here after another engine died or left."
        )
        self.fenced_writes = counter(
            "quire_fenced_writes", "Writes rejected because another engine has the lease."
        )
        self.queue_events = counter(
            "quire_queue_events",
            "Events of this process's queue client, by kind.",
            event=QueueEvent,
        )
        self.lost_leases = counter("quire_lost_leases", "Leases of this engine that expired.")
        self.write_time = histogram(
            "quire_journal_write_seconds",
            "Duration of one write of a step's records.",
            STEP_BUCKETS,
        )
        self.claimed_seconds = self._model_histogram(
            "quire_engine_seconds", "Time from a request's claim to its end.", DURATION_BUCKETS
        )


def _with_values(metric: _Labelled, labels: Mapping[str, Iterable[str]]) -> _Labelled:
    """Creates the series of all known label values: a rate misses a series that begins at 1."""
    if labels:
        for values in product(*labels.values()):
            metric.labels(*values)
    return metric
