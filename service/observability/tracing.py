"""Tracing: one trace for each call, from HTTP through the queue to every engine that answers it.

    POST /v1/chat/completions        the call at its API replica; a child of its caller's span
      queue                          from submission to the first claim; told by the engine
      generate                       what one engine did of one request, with events `first_token`,
      generate                       `preemption`, `take_over`; another one a take-over or choice

A call's trace travels in its requests, as the header `traceparent` would say it, so whichever
engine claims one knows where it belongs. A span is made when what it tells of is over: an engine
that is killed tells nothing more, and the one that takes over says what it found. Attributes hold
counts, times and names; never a prompt, a text or a secret.

With tracing off nothing of this is made: requests carry no trace, observers are `Metrics` alone.
Where spans go is a `Tracer`; `tracing_otlp` has the one that sends them, over OpenTelemetry's SDK.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, Self

from service.api.observer import ApiObserver, HttpCall
from service.engine.observer import Observer, StepReport
from service.messages import End, FinishReason
from service.queues.contract import Claim
from service.worker.observer import WorkerObserver

Value = str | int | float | bool | tuple[str, ...]

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = 1
TRACED_ROUTES = "/v1/"


class SpanKind(StrEnum):
    """Who asked for it: a client elsewhere, this service itself, a queue."""

    SERVER = "server"
    INTERNAL = "internal"
    CONSUMER = "consumer"


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where a span stands, as W3C's `traceparent` says it: 32 and 16 hexadecimal digits."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @classmethod
    def new(cls) -> Self:
        """The root of a trace of its own."""
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    @classmethod
    def parse(cls, header: str | None) -> Self | None:
        """None where there is no header, or none that means anything."""
        match = _TRACEPARENT.fullmatch(header or "")
        if match is None or not int(match[1], 16) or not int(match[2], 16):
            return None
        return cls(match[1], match[2], bool(int(match[3], 16) & _SAMPLED))

    def child(self) -> Self:
        """A new span of the same trace."""
        return type(self)(self.trace_id, secrets.token_hex(8), self.sampled)

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanEvent:
    """Something that happened in a span. Unix seconds."""

    name: str
    at: float
    attributes: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A span that is over. Times in Unix seconds."""

    name: str
    context: TraceContext
    parent: TraceContext | None
    kind: SpanKind
    start: float
    end: float
    attributes: Mapping[str, Value]
    events: tuple[SpanEvent, ...] = ()
    error: str | None = None


class Tracer(Protocol):
    """Takes spans that are over. Must not block and must not raise. Any thread."""

    def record(self, span: Span) -> None:
        """Keeps it or sends it."""
        ...

    def close(self) -> None:
        """Sends what is left. May take a second."""
        ...


class TracedCalls:
    """An ApiObserver: records a span for each call of the API, and tells `then` everything."""

    def __init__(
        self, then: ApiObserver, tracer: Tracer, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._then = then
        self._tracer = tracer
        self._clock = clock
        self.call_answered = then.call_answered
        self.call_accepted = then.call_accepted
        self.call_refused = then.call_refused
        self.call_unserved = then.call_unserved
        self.call_lost = then.call_lost
        self.call_ended = then.call_ended

    def call_began(self, traceparent: str | None) -> str | None:
        """Goes on with the caller's trace, or begins one; what the caller does not sample is not
        sampled here.
        """
        self._then.call_began(traceparent)
        parent = TraceContext.parse(traceparent)
        own = TraceContext.new() if parent is None else parent.child()
        return str(own) if own.sampled else None

    def call_over(self, call: HttpCall) -> None:
        """Records the call's span."""
        self._then.call_over(call)
        own = TraceContext.parse(call.trace)
        if own is None or call.route is None or not call.route.startswith(TRACED_ROUTES):
            return
        now = self._clock()
        self._tracer.record(
            Span(
                name=f"{call.method} {call.route}",
                context=own,
                parent=TraceContext.parse(call.parent),
                kind=SpanKind.SERVER,
                start=now - call.duration,
                end=now,
                attributes={
                    "http.request.method": call.method,
                    "http.route": call.route,
                    "http.response.status_code": call.status,
                    "quire.call.id": call.id,
                },
                error=f"HTTP {call.status}" if call.status >= 500 else None,
            )
        )


@dataclass(slots=True)
class _Open:
    """A claim that an engine works on."""

    claim: Claim
    context: TraceContext
    parent: TraceContext
    start: float
    events: list[SpanEvent] = field(default_factory=list)


class EngineObserver(WorkerObserver, Observer, Protocol):
    """What an engine replica tells: its worker and its loop."""


class TracedWork:
    """An EngineObserver: records a span for each claim, and tells `then` everything.

    `model` and `engine` are the names under which the engine is known.
    """

    def __init__(
        self,
        then: EngineObserver,
        tracer: Tracer,
        *,
        model: str,
        engine: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._then = then
        self._tracer = tracer
        self._model = model
        self._engine = engine
        self._clock = clock
        self._open: dict[str, _Open] = {}
        self.ended = then.ended
        self.fenced = then.fenced
        self.lease_lost = then.lease_lost
        self.wasted = then.wasted
        self.wrote = then.wrote

    def claimed(self, claim: Claim) -> None:
        """Records how long it waited; from here on this engine's span runs."""
        self._then.claimed(claim)
        parent = TraceContext.parse(claim.request.trace)
        if parent is None:
            return
        now = self._clock()
        mine = _Open(claim, parent.child(), parent, now)
        self._open[claim.request.id] = mine
        if claim.waited_ms is not None:
            self._tracer.record(
                Span(
                    name="queue",
                    context=parent.child(),
                    parent=parent,
                    kind=SpanKind.INTERNAL,
                    start=now - claim.waited_ms / 1000,
                    end=now,
                    attributes=self._who(claim),
                )
            )
        if claim.lease.epoch > 1:
            found: dict[str, Value] = {"quire.tokens": len(claim.tokens)}
            mine.events.append(SpanEvent(name="take_over", at=now, attributes=found))

    def first_token(self, request_id: str) -> None:
        """Notes when it was in the journal."""
        self._then.first_token(request_id)
        self._note(request_id, "first_token")

    def stepped(self, report: StepReport) -> None:
        """Notes who was preempted. Called from the engine's thread."""
        self._then.stepped(report)
        for request_id in report.preempted:
            self._note(request_id, "preemption")

    def let_go(self, claim: Claim, outcome: str, *, written: int, end: End | None = None) -> None:
        """Records this engine's span."""
        self._then.let_go(claim, outcome, written=written, end=end)
        mine = self._open.pop(claim.request.id, None)
        if mine is None:
            return
        done: dict[str, Value] = {"gen_ai.usage.output_tokens": written, "quire.outcome": outcome}
        error = None
        if end is not None:
            done["gen_ai.response.finish_reasons"] = (end.reason.value,)
            done["gen_ai.usage.cache_read.input_tokens"] = end.cached_tokens
            if end.reason is FinishReason.ERROR:
                error = end.error or outcome
        self._tracer.record(
            Span(
                name="generate",
                context=mine.context,
                parent=mine.parent,
                kind=SpanKind.CONSUMER,
                start=mine.start,
                end=self._clock(),
                attributes=self._asked(claim) | self._who(claim) | done,
                events=tuple(mine.events),
                error=error,
            )
        )

    def _note(self, request_id: str, name: str) -> None:
        mine = self._open.get(request_id)
        if mine is not None:
            mine.events.append(SpanEvent(name=name, at=self._clock()))

    def _who(self, claim: Claim) -> dict[str, Value]:
        return {
            "quire.request.id": claim.request.id,
            "quire.engine.id": self._engine,
            "quire.attempt": claim.attempt,
            "quire.epoch": claim.lease.epoch,
        }

    def _asked(self, claim: Claim) -> dict[str, Value]:
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
