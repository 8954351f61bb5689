"""OtlpTracer: sends spans to a collector, by OpenTelemetry's SDK. Loaded only where tracing is on.

The SDK batches them and sends them from a thread of its own; what cannot be sent is dropped there,
with a line in the log. Its own variables (OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_...) hold.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags
from opentelemetry.trace import SpanKind as OtelKind

from service.observability.tracing import Span, SpanKind, TraceContext

PATH = "/v1/traces"
SEND_EVERY = 1000  # milliseconds
CLOSE_WITHIN = 2.0  # seconds; a collector that is away holds up nobody's end
KINDS = {
    SpanKind.SERVER: OtelKind.SERVER,
    SpanKind.INTERNAL: OtelKind.INTERNAL,
    SpanKind.CONSUMER: OtelKind.CONSUMER,
}


class OtlpTracer:
    """`resource` says who sends; `processor` takes what is recorded."""

    def __init__(self, processor: SpanProcessor, *, resource: Mapping[str, str]) -> None:
        self._processor = processor
        self._resource = Resource.create(dict(resource))
        self._scope = InstrumentationScope("quire")

    def record(self, span: Span) -> None:
        """Hands it to the processor, as the SDK's own type."""
        self._processor.on_end(
            ReadableSpan(
                name=span.name,
                context=_context(span.context),
                parent=None if span.parent is None else _context(span.parent, remote=True),
                resource=self._resource,
                attributes=dict(span.attributes),
                events=[
                    Event(event.name, dict(event.attributes), timestamp=_nanoseconds(event.at))
                    for event in span.events
                ],
                kind=KINDS[span.kind],
                status=Status() if span.error is None else Status(StatusCode.ERROR, span.error),
                start_time=_nanoseconds(span.start),
                end_time=_nanoseconds(span.end),
                instrumentation_scope=self._scope,
            )
        )

    def close(self) -> None:
        """Sends what is left, as far as that goes at once."""
        closing = threading.Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_WITHIN)


def open_otlp(endpoint: str, *, resource: Mapping[str, str]) -> OtlpTracer:
    """Sends to a collector's address, as OpenTelemetry speaks it over HTTP."""
    url = endpoint if endpoint.endswith(PATH) else endpoint.rstrip("/") + PATH
    exporter = OTLPSpanExporter(endpoint=url)
    processor = BatchSpanProcessor(exporter, schedule_delay_millis=SEND_EVERY)
    return OtlpTracer(processor, resource=resource)


def _context(context: TraceContext, *, remote: bool = False) -> SpanContext:
    return SpanContext(
        int(context.trace_id, 16),
        int(context.span_id, 16),
        is_remote=remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT),
    )


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
