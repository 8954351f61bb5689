"""One call is one trace: from HTTP through the queue to every engine that works on it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import get_current_span

from model.batch import Batch
from model.text.tokenizer import Tokenizer
from service.api.http.auth import only_with_key
from service.api.http.context import ApiLimits, Models
from service.app import build_app, served_model
from service.engine.loop import EngineLoop
from service.engine.plan import EngineConfig
from service.errors import StartupError, Unavailable
from service.messages import End, Event, GenerationRequest, ModelCard, SamplingParams, Submission
from service.observability.fan_out import fan_out
from service.observability.metrics import Metrics, ModelMetrics
from service.observability.otlp import OtlpTraces
from service.observability.tracing import TracedCalls, TracedWork, context_of, traceparent_of
from service.parts import open_traces
from service.queues.contract import EngineInfo, Lease, Queue, QueueLimits
from service.queues.memory.queue import MemoryQueue
from service.settings import Settings
from service.worker.worker import Worker
from tests.cluster.processes import run_command
from tests.conftest import ROOT
from tests.support.fakes import ALL_WELL, EOS_IDS, TOKEN_BYTES, OracleRunner, oracle_answer
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE, until

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PROMPT = [11, 12, 13, 14]


class Traces:
    """A tracer, and its spans."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        processor = SimpleSpanProcessor(self._exporter)
        self.tracer = OtlpTraces(processor, resource={"service.name": "quire-test"}).tracer

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        finished = self._exporter.get_finished_spans()
        return [span for span in finished if name in {None, span.name}]

    def span(self, name: str) -> ReadableSpan:
        (span,) = self.spans(name)
        return span


@pytest.fixture
def traces() -> Traces:
    return Traces()


@pytest.fixture(autouse=True)
def engines_leave_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.worker.worker.CLAIM_WAIT", 0.01)


class Engine:
    """One engine with its worker, traced; what it computes is the oracle's."""

    def __init__(
        self,
        queue: Queue,
        traces: Traces,
        name: str,
        *,
        on_run: Callable[[Batch], None] | None = None,
        num_blocks: int = 64,
    ) -> None:
        work = TracedWork(traces.tracer, model="oracle", engine=name)
        observers: list[ModelMetrics | TracedWork] = [Metrics().of_model("oracle"), work]
        self.loop = EngineLoop(
            OracleRunner(num_blocks=num_blocks, on_run=on_run),
            config=EngineConfig(max_batch_tokens=32, max_sequences=4),
            token_bytes=TOKEN_BYTES,
            eos_ids=EOS_IDS,
            deliver=self._deliver,
            observer=fan_out(*observers),
        )
        info = EngineInfo(id=name, numeric_class="oracle", version="0")
        self.worker = Worker(queue, self.loop, info=lambda: info, observer=fan_out(*observers))

    def _deliver(self, events: Sequence[Event]) -> None:
        self.worker.deliver(events)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[Engine]:
        task = asyncio.create_task(self.worker.run())
        try:
            yield self
        finally:
            self.worker.drain()
            await task


def make_request(*, trace: str | None, max_tokens: int = 12, name: str = "call") -> Submission:
    request = GenerationRequest(
        id=f"{name}.0",
        prompt_ids=tuple(PROMPT),
        sampling=SamplingParams(seed=3),
        max_tokens=max_tokens,
        ignore_eos=True,
        trace=trace,
    )
    return Submission(id=name, tenant="public", requests=(request,))


async def ended(queue: Queue, submission: Submission) -> list[int]:
    """The answer's tokens, at its end."""
    ids: list[int] = []
    async with asyncio.timeout(PATIENCE):
        async for record in queue.follow(submission.requests[0].id):
            if not isinstance(record, End):
                ids += record.ids
    return ids


def parent_of(span: ReadableSpan) -> str:
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


def id_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def events_of(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


# --- the header -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "nonsense",
        CALLER.upper(),
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        CALLER + "-more",
        "ff" + CALLER[2:],
    ],
)
def test_a_header_that_means_nothing_is_none(header: str | None) -> None:
    assert not get_current_span(context_of(header)).get_span_context().is_valid


def test_a_header_is_read_as_it_is_written() -> None:
    span = get_current_span(context_of(CALLER))
    assert traceparent_of(span) == CALLER
    child = Traces().tracer.start_span("child", context_of(CALLER))
    parent, own = span.get_span_context(), child.get_span_context()
    assert (own.trace_id, own.trace_flags.sampled) == (parent.trace_id, True)
    assert own.span_id != parent.span_id
    assert (
        get_current_span(context_of(traceparent_of(child))).get_span_context().span_id
        == own.span_id
    )


# --- one process ----------------------------------------------------------------------------------
@pytest.fixture
def client(traces: Traces, tiny_tokenizer: Tokenizer) -> tuple[httpx.AsyncClient, MemoryQueue]:
    """The API, traced, over a queue."""
    queue = MemoryQueue(QueueLimits(max_tokens=100))
    card = ModelCard(id="m", max_model_len=64, vocab_size=97, numeric_class="oracle", created=0)
    app = build_app(
        queue,
        Models.of(served_model(tiny_tokenizer, lambda: card)),
        probes=ALL_WELL,
        limits=ApiLimits(),
        observer=fan_out(Metrics(), TracedCalls(traces.tracer)),
        version="0",
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test"), queue


BODY = {"model": "m", "prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, "temperature": 0.5}


async def test_one_call_is_one_trace(traces: Traces, client: Any) -> None:
    http, queue = client
    began = time.time()
    async with Engine(queue, traces, "e").working():
        headers = {"traceparent": CALLER}
        reply = await http.post("/v1/completions", json=BODY | {"stream": True}, headers=headers)
    assert reply.status_code == 200
    server = traces.span("POST /v1/completions")
    waited, generated = traces.span("queue"), traces.span("generate")
    assert {trace_of(span) for span in traces.spans()} == {CALLER.split("-")[1]}
    assert parent_of(server) == CALLER.split("-")[2]
    assert parent_of(waited) == parent_of(generated) == id_of(server)
    assert len({id_of(span) for span in traces.spans()}) == 3
    for span in traces.spans():
        assert span.start_time is not None
        assert span.end_time is not None
        assert began - 0.01 <= span.start_time / 1e9 <= span.end_time / 1e9 <= time.time() + 0.01
        assert span.resource.attributes["service.name"] == "quire-test"
    assert server.attributes is not None
    assert server.attributes["http.response.status_code"] == 200
    assert server.attributes["quire.call.id"] == reply.headers["x-request-id"]
    assert generated.attributes is not None
    assert {name: generated.attributes[name] for name in EXPECTED} == EXPECTED
    assert events_of(generated) == ["first_token"]


EXPECTED = {
    "gen_ai.operation.name": "text_completion",
    "gen_ai.request.model": "oracle",
    "gen_ai.request.max_tokens": 6,
    "gen_ai.request.temperature": 0.5,
    "gen_ai.usage.input_tokens": 4,
    "gen_ai.usage.output_tokens": 6,
    "gen_ai.usage.cache_read.input_tokens": 0,
    "gen_ai.response.finish_reasons": ("length",),
    "quire.outcome": "length",
    "quire.engine.id": "e",
    "quire.attempt": 1,
    "quire.epoch": 1,
}


async def test_a_span_holds_no_word_of_a_prompt_or_an_answer(traces: Traces, client: Any) -> None:
    http, queue = client
    body = BODY | {"stop": ["unusual stop"], "user": "somebody", "max_tokens": 24}
    async with Engine(queue, traces, "e").working():
        reply = await http.post("/v1/completions", json=body)
    told = json.dumps([json.loads(span.to_json()) for span in traces.spans()])
    assert len(traces.spans()) == 3
    text = reply.json()["choices"][0]["text"]
    assert len(text) > 20
    for word in ("unusual", "somebody", text, text[:8], "11, 12", "13, 14"):
        assert word not in told


async def test_every_choice_has_its_spans_in_the_one_trace(traces: Traces, client: Any) -> None:
    http, queue = client
    async with Engine(queue, traces, "e").working():
        await http.post("/v1/completions", json=BODY | {"n": 3})
    server = traces.span("POST /v1/completions")
    assert server.parent is None
    assert len(traces.spans("generate")) == len(traces.spans("queue")) == 3
    assert {parent_of(span) for span in traces.spans("generate")} == {id_of(server)}
    assert {trace_of(span) for span in traces.spans()} == {trace_of(server)}


async def test_what_its_caller_leaves_out_is_left_out(traces: Traces, client: Any) -> None:
    http, queue = client
    async with Engine(queue, traces, "e").working():
        headers = {"traceparent": CALLER[:-2] + "00"}
        await http.post("/v1/completions", json=BODY, headers=headers)
        await http.get("/health/ready")
        await http.get("/nothing/here")
    assert traces.spans() == []


async def test_refusals_are_traced_and_only_faults_are_errors(traces: Traces, client: Any) -> None:
    http, _ = client
    await http.post("/v1/completions", json=BODY | {"max_tokens": -1})
    full = BODY | {"n": 8, "max_tokens": 60}
    assert (await http.post("/v1/completions", json=full)).status_code == 503
    bad, refused = traces.spans("POST /v1/completions")
    assert bad.attributes is not None
    assert bad.attributes["http.response.status_code"] == 400
    assert bad.status.is_ok or bad.status.status_code.name == "UNSET"
    assert refused.status.status_code.name == "ERROR"


async def test_a_call_without_a_valid_key_leaves_no_open_span(
    traces: Traces, tiny_tokenizer: Tokenizer
) -> None:
    """Else anyone could fill the memory with spans that nothing ends."""
    card = ModelCard(id="m", max_model_len=64, vocab_size=97, numeric_class="o", created=0)
    calls = TracedCalls(traces.tracer)
    app = build_app(
        MemoryQueue(QueueLimits()),
        Models.of(served_model(tiny_tokenizer, lambda: card)),
        probes=ALL_WELL,
        limits=ApiLimits(),
        observer=calls,
        version="0",
        authenticate=only_with_key(lambda _key: None),
    )
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")
    assert (await http.post("/v1/completions", json=BODY)).status_code == 401
    assert (await http.get("/health/live")).status_code == 200
    assert not calls._open
    assert traces.spans() == []


# --- several engines ------------------------------------------------------------------------------
def slowly(_batch: Batch) -> None:
    time.sleep(0.003)


async def test_a_preemption_is_told_where_it_happened(traces: Traces) -> None:
    queue = MemoryQueue(QueueLimits())
    calls = [make_request(trace=CALLER, max_tokens=40, name=f"c{index}") for index in range(3)]
    for call in calls:
        await queue.submit(call)
    async with Engine(queue, traces, "e", num_blocks=20).working():
        for call in calls:
            assert await ended(queue, call) == oracle_answer(call.requests[0])
    told = [events_of(span) for span in traces.spans("generate")]
    assert sum(events.count("preemption") for events in told) > 0
    assert ["first_token"] in told, "the first in order is never displaced"


async def test_a_drained_engine_and_the_next_one_are_in_one_trace(traces: Traces) -> None:
    queue = MemoryQueue(QueueLimits(lease=30))
    call = make_request(trace=CALLER, max_tokens=40)
    await queue.submit(call)
    async with Engine(queue, traces, "first", on_run=slowly).working() as first:
        await until(lambda: queue._entries["call.0"].count >= 5)
    assert first.worker.running == 0
    async with Engine(queue, traces, "second").working():
        assert await ended(queue, call) == oracle_answer(call.requests[0])
    left, went_on = traces.spans("generate")
    assert left.attributes is not None
    assert went_on.attributes is not None
    found = (left.attributes["quire.engine.id"], left.attributes["quire.outcome"])
    assert found == ("first", "released")
    assert "gen_ai.response.finish_reasons" not in left.attributes
    assert went_on.attributes["quire.engine.id"] == "second"
    assert went_on.attributes["quire.outcome"] == "length"
    assert left.attributes["quire.epoch"] == 1
    assert int(str(went_on.attributes["quire.epoch"])) > 1
    assert (
        went_on.attributes["quire.continued_tokens"]
        == left.attributes["gen_ai.usage.output_tokens"]
    )
    assert events_of(went_on) == ["take_over", "first_token"]
    assert parent_of(left) == parent_of(went_on) == CALLER.split("-")[2]
    assert {trace_of(span) for span in traces.spans()} == {CALLER.split("-")[1]}
    assert len(traces.spans("queue")) == 1


class CutOff(MemoryQueue):
    """Cannot be reached by the engine that holds the leases, from a moment on."""

    lost: frozenset[str] = frozenset()

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        if {lease.owner.split(":")[0] for lease in leases} & self.lost:
            raise Unavailable("away")
        return await super().renew(leases)

    async def write(self, writes: Any) -> Any:
        if {write.lease.owner.split(":")[0] for write in writes} & self.lost:
            raise Unavailable("away")
        return await super().write(writes)


async def test_so_are_one_that_was_cut_off_and_the_one_that_took_over(traces: Traces) -> None:
    queue = CutOff(QueueLimits(lease=0.09))
    call = make_request(trace=CALLER, max_tokens=50)
    await queue.submit(call)
    async with Engine(queue, traces, "first", on_run=slowly).working() as first:
        await until(lambda: queue._entries["call.0"].count >= 5)
        queue.lost = frozenset({"first"})
        await until(lambda: not first.worker.running)
    async with Engine(queue, traces, "second").working():
        assert await ended(queue, call) == oracle_answer(call.requests[0])
    spans = traces.spans("generate")
    outcomes = [span.attributes["quire.outcome"] for span in spans if span.attributes]
    assert (outcomes[0], outcomes[-1]) == ("lease_lost", "length")
    assert events_of(spans[-1])[0] == "take_over"
    assert {trace_of(span) for span in traces.spans()} == {CALLER.split("-")[1]}


async def test_a_request_without_a_trace_leaves_none(traces: Traces) -> None:
    queue = MemoryQueue(QueueLimits())
    call = make_request(trace=None)
    await queue.submit(call)
    async with Engine(queue, traces, "e").working():
        await ended(queue, call)
    assert traces.spans() == []


def test_a_trace_goes_through_json_with_its_request() -> None:
    request = make_request(trace=CALLER).requests[0]
    assert GenerationRequest.from_json(request.to_json()) == request


# --- on and off -----------------------------------------------------------------------------------
def test_off_is_nothing_and_on_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_traces(Settings(), "api") is None
    monkeypatch.setitem(sys.modules, "service.observability.otlp", None)
    with pytest.raises(StartupError, match="quire-llm\\[otel\\]"):
        open_traces(Settings(otlp_endpoint="http://127.0.0.1:4318"), "api")


def test_a_collector_that_hangs_holds_up_nobodys_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.observability.otlp.CLOSE_WITHIN", 0.01)
    answers = threading.Event()
    processor = SimpleSpanProcessor(InMemorySpanExporter())
    monkeypatch.setattr(processor, "shutdown", answers.wait)
    OtlpTraces(processor, resource={}).close()  # returns without a reply
    answers.set()


class Collector:
    """What an OpenTelemetry collector hears over HTTP."""

    def __init__(self) -> None:
        heard: list[ExportTraceServiceRequest] = []
        self.heard = heard

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                data = self.rfile.read(int(self.headers["content-length"]))
                heard.append(ExportTraceServiceRequest.FromString(data))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                """Says nothing."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[tuple[str, Any]]:
        """(service, span) in the order they came."""
        return [
            (resource.resource.attributes[0].value.string_value, span)
            for request in list(self.heard)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.mark.slow
def test_a_real_process_sends_its_traces(
    collector: Collector, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Also the last ones, before it ends."""
    folder = tiny_model.write_folder(tmp_path / "tiny")
    flags = ["--model", str(folder), "--runner", "torch", "--dtype", "float32", "--threads", "1"]
    flags += ["--port", "0", "--admin-port", "0", "--kv-memory", "4MiB"]
    server = run_command("serve", tmp_path / "log", *flags, "--otlp-endpoint", collector.url)
    try:
        server.wait_until_ready()
        host, port = server.address("API")
        body = {"model": "tiny", "prompt": "the", "max_tokens": 3, "ignore_eos": True}
        headers = {"traceparent": CALLER}
        url = f"http://{host}:{port}/v1/completions"
        assert httpx.post(url, json=body, headers=headers, timeout=30).status_code == 200
        server.terminate()
        assert server.exit_code() == 0
    finally:
        server.close()
    found = {span.name: span for _, span in collector.spans()}
    assert set(found) == {"POST /v1/completions", "queue", "generate"}
    assert {span.trace_id.hex() for span in found.values()} == {CALLER.split("-")[1]}
    assert found["generate"].parent_span_id == found["POST /v1/completions"].span_id


@pytest.mark.slow
def test_nothing_of_opentelemetry_is_loaded_while_it_is_off() -> None:
    code = "import sys, service.roles; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
