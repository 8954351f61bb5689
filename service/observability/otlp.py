"""OtlpTraces: exports spans with OpenTelemetry's SDK. Imported only if tracing is on.

The SDK batches spans and sends them from its own thread; what cannot be sent is dropped there and
logged. Its environment variables (OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, OTEL_BSP_...)
apply.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

PATH = "/v1/traces"
SEND_EVERY = 1000  # milliseconds
CLOSE_WITHIN = 2.0  # seconds; an unreachable collector must not delay the end of the process


class OtlpTraces:
    """`tracer` makes spans for `processor`. `resource` describes this process."""

    def __init__(self, processor: SpanProcessor, *, resource: Mapping[str, str]) -> None:
        self._provider = TracerProvider(
            resource=Resource.create(dict(resource)), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("quire")

    def close(self) -> None:
        """Sends the remaining spans, for at most `CLOSE_WITHIN` seconds."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_WITHIN)


def open_otlp(endpoint: str, *, resource: Mapping[str, str]) -> OtlpTraces:
    """Exports to the OTLP/HTTP endpoint of a collector."""
    url = endpoint if endpoint.endswith(PATH) else endpoint.rstrip("/") + PATH
    exporter = OTLPSpanExporter(endpoint=url)
    processor = BatchSpanProcessor(exporter, schedule_delay_millis=SEND_EVERY)
    return OtlpTraces(processor, resource=resource)
