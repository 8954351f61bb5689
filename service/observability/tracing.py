"""Tracing: one trace per call, from HTTP through the queue to every engine that works on it.

    POST /v1/chat/completions        the call at its API replica; a child of its caller's span
      queue                          from submission to the first claim; recorded by the engine
      generate                       one engine's work on one request; events: `first_token`,
      generate                       `preemption`, `take_over`. One more per failover and per choice

The trace travels with the call's requests as a W3C `traceparent`, so any engine that claims one can
continue it. A span is exported when it ends: an engine that is killed exports nothing, and the next
one records what it found. Attributes hold counts, times and names; never a prompt, an output or a
secret.

Without `--otlp-endpoint` there are no such observers, and requests carry no trace. This module uses
OpenTelemetry's API only; the exporter is in `otlp`.
"""

from __future__ import annotations

import time

from opentelemetry.context import Context
from opentelemetry.trace import (
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from service.api.http.observer import ApiObserver, HttpCall
from service.engine.observer import Observer, StepReport
from service.messages import End, FinishReason
from service.queues.contract import Claim
from service.worker.observer import WorkerObserver

TRACED_ROUTES = "/v1/"
_W3C = TraceContextTextMapPropagator()


def context_of(traceparent: str | None) -> Context:
    """The context to continue; an empty one if the header is missing or invalid."""
    return _W3C.extract({} if traceparent is None else {"traceparent": traceparent}, Context())


def traceparent_of(span: Span) -> str:
    """The header that makes others continue a span."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, set_span_in_context(span))
    return headers["traceparent"]


class TracedCalls(ApiObserver):
    """An ApiObserver that records a span per call of the API."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._open: dict[str, Span] = {}  # by the call's traceparent

    def call_began(self, traceparent: str | None) -> str | None:
        """Continues the caller's trace or begins one. Not sampled by the caller: not sampled."""
        context = context_of(traceparent)
        span = self._tracer.start_span("HTTP", context, kind=SpanKind.SERVER)
        if not span.is_recording():
            return None
        own = traceparent_of(span)
        self._open[own] = span
        return own

    def call_over(self, call: HttpCall) -> None:
        span = self._open.pop(call.trace)
        if call.route is None or not call.route.startswith(TRACED_ROUTES):
            return  # a span that does not end is not exported
        span.update_name(f"{call.method} {call.route}")
        span.set_attributes(
            {
                "http.request.method": call.method,
                "http.route": call.route,
                "http.response.status_code": call.status,
                "quire.call.id": call.id,
            }
        )
        if call.status >= 500:
            span.set_status(StatusCode.ERROR, f"HTTP {call.status}")
        span.end()


class TracedWork(WorkerObserver, Observer):
    """Observes a worker and its engine; records a span per claim.

    `model` and `engine` are names for the attributes.
    """

    def __init__(self, tracer: Tracer, *, model: str, engine: str) -> None:
        self._tracer = tracer
        self._model = model
        self._engine = engine
        self._open: dict[str, Span] = {}  # by request id

    def claimed(self, claim: Claim) -> None:
        """Records the time in the queue, and begins this engine's span."""
        context = context_of(claim.request.trace)
        if not get_current_span(context).get_span_context().is_valid:
            return
        now, ids = time.time_ns(), self._ids(claim)
        if claim.waited_ms is not None:
            submitted = now - claim.waited_ms * 1_000_000
            self._tracer.start_span("queue", context, start_time=submitted, attributes=ids).end(now)
        span = self._tracer.start_span(
            "generate", context, kind=SpanKind.CONSUMER, start_time=now, attributes=ids
        )
        span.set_attributes(self._request_attributes(claim))
        if claim.lease.epoch > 1:
            span.add_event("take_over", {"quire.tokens": len(claim.tokens)}, now)
        self._open[claim.request.id] = span

    def first_token(self, request_id: str) -> None:
        self._add_event(request_id, "first_token")

    def stepped(self, report: StepReport) -> None:
        """Records preemptions. Called from the engine's thread."""
        for request_id in report.preempted:
            self._add_event(request_id, "preemption")

    def released(self, claim: Claim, outcome: str, *, written: int, end: End | None = None) -> None:
        """Ends this engine's span."""
        span = self._open.pop(claim.request.id, None)
        if span is None:
            return
        span.set_attributes({"gen_ai.usage.output_tokens": written, "quire.outcome": outcome})
        if end is not None:
            span.set_attribute("gen_ai.response.finish_reasons", (end.reason.value,))
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", end.cached_tokens)
            if end.reason is FinishReason.ERROR:
                span.set_status(StatusCode.ERROR, end.error or outcome)
        span.end()

    def _add_event(self, request_id: str, name: str) -> None:
        span = self._open.get(request_id)
        if span is not None:
            span.add_event(name)

    def _ids(self, claim: Claim) -> Attributes:
        return {
            "quire.request.id": claim.request.id,
            "quire.engine.id": self._engine,
            "quire.attempt": claim.attempt,
            "quire.epoch": claim.lease.epoch,
        }

    def _request_attributes(self, claim: Claim) -> dict[str, str | int | float]:
        request = claim.request
        return {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "quire",
            "gen_ai.request.model": self._model,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": request.sampling.temperature,
            "gen_ai.request.top_p": request.sampling.top_p,
            "gen_ai.usage.input_tokens": len(request.prompt_ids),
            "quire.continued_tokens": len(claim.tokens),
        }
