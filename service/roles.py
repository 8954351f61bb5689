"""Roles: what each command is made of. With `__main__`, the only place that names concrete classes.

    serve     API, queue and engine in one process; with a Redis queue it is one of many
    api       an API replica: no torch in memory
    engine    an engine replica: no public port

Each is one event loop; an engine's network runs in a thread beside it. A role ends on SIGTERM or
SIGINT, as `drain` describes, and at once, with exit code 1, if its engine breaks.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import uvloop
from fastapi import FastAPI
from rich.console import Console

from model.checkpoint import open_checkpoint
from model.grammar import Grammars
from model.text.tokenizer import Tokenizer
from service.api.auth import only_with_key, open_to_all
from service.api.context import Probes
from service.api.hosts import any_host
from service.api.limits import ApiLimits
from service.api.system.attention_service import AttentionReader
from service.app import build_admin_app, build_app
from service.cluster import Cluster
from service.engine.loop import EngineLoop
from service.engine.plan import EngineConfig
from service.errors import StartupError, Unavailable
from service.http.descriptors import open_places
from service.http.drain import StopSignals, drain
from service.http.exposure import extras_of, keyless_hosts, refuse_exposure
from service.http.listeners import Listener
from service.http.ports import address, bind_admin, bind_public
from service.keys import KeyRing
from service.messages import FEATURES, Event, ModelCard
from service.observability.fan_out import fan_out
from service.observability.logs import log_call, set_up_logging
from service.observability.metrics import Metrics
from service.observability.tracing import TracedCalls, TracedWork
from service.queues import open_queue
from service.queues.contract import EngineInfo, Queue, QueueLimits
from service.settings import Settings
from service.startup import Loaded, fetch_model, load_card, load_engine, load_tokenizer
from service.worker.worker import EngineFailure, Worker

if TYPE_CHECKING:
    from service.observability.otlp import OtlpTraces

log = logging.getLogger("quire")

VERSION = distribution_version("quire-llm")

Role = Callable[[Settings, Console], Coroutine[None, None, None]]


def run_role(role: Role, settings: Settings, *, console: Console) -> None:
    """Runs a role to its end. Raises StartupError for what cannot be served."""
    set_up_logging(settings.log_level, settings.log_format)
    end_at_once_on_signals(console)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(role(settings, console))
        except EngineFailure as failure:
            log.critical("the engine broke; exiting", exc_info=failure.__cause__)
            sys.exit(1)


def end_at_once_on_signals(console: Console) -> None:
    """Until the role serves, a signal ends the process: no thread that loads or fetches is waited
    for.
    """

    def end(number: int, _frame: object) -> None:
        console.show_cursor()  # which a progress bar hides
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


async def serve(settings: Settings, console: Console) -> None:
    """Everything in one process."""
    refuse_exposure(settings)
    metrics, traces = make_metrics(settings, "serve"), open_traces(settings, "serve")
    keys = open_keys(settings, metrics)
    places = open_places(settings, observer=metrics)
    public, admin = bind_public(settings), bind_admin(settings)
    path = await asyncio.to_thread(fetch_model, settings, console=console)
    loaded = await asyncio.to_thread(load_engine, settings, path)
    queue = await opened_queue(settings, metrics)
    engine = EngineSide(settings, loaded, queue, metrics, traces=traces)
    api = ApiSide(
        settings,
        loaded.card,
        queue,
        metrics,
        tokenizer=loaded.tokenizer,
        engine=engine,
        attention=attention_reader(settings, path),
        keys=keys,
        traces=traces,
    )
    rows = engine_rows(loaded, path) | api_rows(settings, address(public), address(admin))
    listeners = [
        Listener(api.app, public, grace=None, connections=places.api),
        Listener(api.admin_app, admin, connections=places.admin),
    ]
    ready = partial(banner, console, settings, rows)
    await live(queue, listeners, api=api, engine=engine, traces=traces, ready=ready)
    loaded.runner.close()


async def serve_api(settings: Settings, console: Console) -> None:
    """An API replica over a shared queue."""
    refuse_exposure(settings)
    metrics, traces = make_metrics(settings, "api"), open_traces(settings, "api")
    keys = open_keys(settings, metrics)
    refuse_private_queue(settings)
    places = open_places(settings, observer=metrics)
    public, admin = bind_public(settings), bind_admin(settings)
    path = await asyncio.to_thread(fetch_model, settings, console=console)
    tokenizer = await asyncio.to_thread(load_tokenizer, path)
    queue = await opened_queue(settings, metrics)
    card = load_card(settings, path)
    api = ApiSide(settings, card, queue, metrics, tokenizer=tokenizer, keys=keys)
    rows = api_rows(settings, address(public), address(admin))
    listeners = [
        Listener(api.app, public, grace=None, connections=places.api),
        Listener(api.admin_app, admin, connections=places.admin),
    ]
    ready = partial(banner, console, settings, rows)
    await live(queue, listeners, api=api, traces=traces, ready=ready)


async def serve_engine(settings: Settings, console: Console) -> None:
    """An engine replica over a shared queue. Its admin port has metrics and probes."""
    refuse_private_queue(settings)
    admin = bind_admin(settings)
    path = await asyncio.to_thread(fetch_model, settings, console=console)
    loaded = await asyncio.to_thread(load_engine, settings, path)
    metrics, traces = make_metrics(settings, "engine"), open_traces(settings, "engine")
    queue = await opened_queue(settings, metrics)
    engine = EngineSide(settings, loaded, queue, metrics, traces=traces)
    # The admin application needs an API's context for its probes; this one has no public port.
    api = ApiSide(settings, loaded.card, queue, metrics, tokenizer=loaded.tokenizer, engine=engine)
    rows = engine_rows(loaded, path) | admin_rows(settings, address(admin))
    places = open_places(settings, observer=metrics)
    listeners = [Listener(api.admin_app, admin, connections=places.admin)]
    ready = partial(banner, console, settings, rows)
    await live(queue, listeners, engine=engine, cluster=api.cluster, traces=traces, ready=ready)
    loaded.runner.close()


def make_metrics(settings: Settings, role: str) -> Metrics:
    """The series of a process. Each call is logged, too."""
    return Metrics(
        role=role,
        version=VERSION,
        vllm_names=settings.vllm_metrics,
        on_call=log_call,
    )


def open_traces(settings: Settings, role: str) -> OtlpTraces | None:
    """The exporter of traces; None, and no SDK imported, if tracing is off. Raises StartupError."""
    if settings.otlp_endpoint is None:
        return None
    try:
        from service.observability.otlp import open_otlp
    except ImportError:
        raise StartupError("otlp_endpoint needs OpenTelemetry: quire-llm[otel]") from None
    names = {"service.name": f"quire-{role}", "service.version": VERSION}
    return open_otlp(settings.otlp_endpoint, resource=names)


def open_keys(settings: Settings, metrics: Metrics) -> KeyRing | None:
    """The keys, where there are any: then nobody is served without one. Raises StartupError."""
    if settings.keys_file is None:
        return None
    return KeyRing(settings.keys_file.expanduser(), on_reload=metrics.keys_reloaded)


def refuse_private_queue(settings: Settings) -> None:
    """Raises StartupError where a replica's queue would be its own."""
    if settings.queue.startswith("memory:"):
        raise StartupError("api and engine replicas meet in a shared queue: --queue redis://...")


async def opened_queue(settings: Settings, metrics: Metrics) -> Queue:
    """The queue, reached and checked. Raises StartupError."""
    queue = open_queue(
        settings.queue,
        QueueLimits(
            max_requests=settings.max_queued_requests,
            max_tokens=settings.max_queued_tokens,
            max_per_tenant=settings.max_per_tenant,
            max_bytes=settings.max_stored_bytes,
            max_tenant_bytes=settings.max_tenant_stored_bytes,
            lease=settings.lease,
            resume_window=settings.resume_window,
            sweep_pause=api_limits(settings).sweep_pause,
        ),
        observer=metrics,
    )
    await queue.open()
    return queue


class EngineSide:
    """The engine and its worker."""

    def __init__(
        self,
        settings: Settings,
        loaded: Loaded,
        queue: Queue,
        metrics: Metrics,
        *,
        traces: OtlpTraces | None = None,
    ) -> None:
        self.id = uuid4().hex
        observers: list[Metrics | TracedWork] = [metrics]
        if traces is not None:
            observers.append(TracedWork(traces.tracer, model=loaded.card.id, engine=self.id))
        self._card = loaded.card
        self._num_blocks = loaded.runner.num_blocks
        self._metrics = metrics
        self.loop = EngineLoop(
            loaded.runner,
            config=EngineConfig(
                max_batch_tokens=loaded.options.max_batch_tokens,
                max_sequences=loaded.options.max_sequences,
                max_model_len=loaded.card.max_model_len,
                target_gap=settings.target_gap,
                speculate=settings.speculate,
            ),
            token_bytes=loaded.tokenizer.token_bytes,
            eos_ids=loaded.tokenizer.eos_ids,
            deliver=self._deliver,
            observer=fan_out(*observers),
            on_failure=lambda _failure: self.worker.fail(),
            grammars=Grammars(
                loaded.tokenizer.token_bytes,
                eos_ids=loaded.tokenizer.eos_ids,
                vocab_size=loaded.card.vocab_size,
            ),
            settle=self._settle,
        )
        self.worker = Worker(queue, self.loop, info=self._info, observer=fan_out(*observers))
        if loaded.followers is not None:
            loaded.followers.when_lost(self._lose_rank)

    def _lose_rank(self, reason: str) -> None:
        """Any thread. The engine is broken, also while it has nothing to do."""
        log.critical(reason)
        self.worker.fail()

    def _deliver(self, events: Sequence[Event]) -> None:
        self.worker.deliver(events)

    def _settle(self) -> None:
        self.worker.settle()

    def _info(self) -> EngineInfo:
        latest = self._metrics.latest
        return EngineInfo(
            id=self.id,
            numeric_class=self._card.numeric_class,
            version=VERSION,
            running=self.worker.running,
            waiting=latest.waiting if latest else 0,
            blocks_used=latest.blocks_used if latest else 0,
            blocks_cached=latest.blocks_cached if latest else 0,
            blocks_free=latest.blocks_free if latest else self._num_blocks,
            max_model_len=self._card.max_model_len,
            tokens_per_second=self._metrics.tokens_per_second(),
            features=tuple(FEATURES),
        )

    def is_live(self) -> bool:
        """Whether it makes progress or has nothing to do. Saturated is not dead."""
        return not self.worker.is_stalled


class ApiSide:
    """The HTTP applications and what they know of the cluster."""

    def __init__(
        self,
        settings: Settings,
        card: ModelCard,
        queue: Queue,
        metrics: Metrics,
        *,
        tokenizer: Tokenizer,
        engine: EngineSide | None = None,
        attention: AttentionReader | None = None,
        keys: KeyRing | None = None,
        traces: OtlpTraces | None = None,
    ) -> None:
        self.draining = False
        self.drain_timeout = settings.drain_timeout
        self.queue = queue
        self.keys = keys
        self.cluster = Cluster(queue, card, observer=metrics)
        metrics.accepts_without_engines.set(settings.accept_without_engines)
        self.app = build_app(
            queue,
            tokenizer,
            lambda: self.cluster.card,
            probes=Probes(
                started=lambda: True,
                live=engine.is_live if engine else lambda: True,
                draining=lambda: self.draining,
                served=lambda: settings.accept_without_engines or self.cluster.has_engines,
                tokens_per_second=self.cluster.tokens_per_second,
            ),
            limits=api_limits(settings),
            observer=metrics if traces is None else fan_out(metrics, TracedCalls(traces.tracer)),
            version=VERSION,
            attention=attention,
            authenticate=only_with_key(keys.find) if keys else open_to_all,
            extras=extras_of(settings),
            check_host=any_host if keys else keyless_hosts(settings),
            cors_origins=settings.cors_origins,
        )
        self.admin_app: FastAPI = build_admin_app(
            self.app, render_metrics=metrics.render, check_host=keyless_hosts(settings)
        )

    def close_answers(self) -> None:
        """Ends the open answers with the error `shutting_down`."""
        self.app.state.context.closing.set()


def attention_reader(settings: Settings, path: Path) -> AttentionReader | None:
    """What shows attention, where that is turned on. It reads weights only when it is asked."""
    if not settings.attention:
        return None
    from model.attention_maps import AttentionMaps

    return AttentionMaps(open_checkpoint(path))


def api_limits(settings: Settings) -> ApiLimits:
    """The API's caps, as far as they are settings."""
    limits = ApiLimits(
        max_body_bytes=settings.max_body,
        keep_alive=settings.keep_alive,
        grace=settings.disconnect_grace,
        resume_window=settings.resume_window,
    )
    return replace(limits, sweep_interval=min(limits.sweep_interval, limits.sweep_pause / 2))


async def live(
    queue: Queue,
    listeners: Sequence[Listener],
    *,
    ready: Callable[[], None],
    api: ApiSide | None = None,
    engine: EngineSide | None = None,
    cluster: Cluster | None = None,
    traces: OtlpTraces | None = None,
) -> None:
    """Serves until a signal or a broken engine, then ends in order. With `api`, the first of the
    listeners is the public one.

    New calls are refused and open ones end, while the admin port still answers; only then the
    engine gives back what is left. Raises EngineFailure, and StartupError if a port is taken after
    all.
    """
    signals = StopSignals()
    serving = [asyncio.create_task(listener.listen()) for listener in listeners]
    cluster = api.cluster if api else cluster
    watching = [asyncio.create_task(cluster.watch())] if cluster else []
    if api and api.keys:
        watching.append(asyncio.create_task(api.keys.watch()))
    working = [asyncio.create_task(engine.worker.run())] if engine else []
    stopping = asyncio.create_task(signals.first.wait())
    hurrying = asyncio.create_task(signals.second.wait())
    # What is alive now stays alive: the collector need not walk it again and again.
    gc.collect()
    gc.freeze()
    announcing = asyncio.create_task(announce(listeners, ready))
    await asyncio.wait([stopping, *working, *serving], return_when=asyncio.FIRST_COMPLETED)
    broken = any(task.done() for task in working)
    if api:
        api.draining = True
        await drain(
            listeners[0],
            serving[0],
            seconds=signals.patience(api.drain_timeout),
            hurry=[hurrying, *working],
            close_answers=api.close_answers,
        )
    elif engine:
        engine.worker.drain()
    for listener in listeners[1:] if api else listeners:
        listener.stop(at_once=broken)
    await asyncio.gather(*serving, return_exceptions=True)
    if engine:
        engine.worker.drain()
    others = (*watching, announcing, stopping, hurrying)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    try:
        await asyncio.gather(*working, *serving)  # they have ended: raises what they raised
    finally:
        with suppress(Unavailable):
            await queue.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)


async def announce(listeners: Sequence[Listener], ready: Callable[[], None]) -> None:
    """Says that it is ready when every port answers."""
    for listener in listeners:
        await listener.answering.wait()
    ready()


def engine_rows(loaded: Loaded, path: Path) -> dict[str, str]:
    """The banner's lines about the model and the engine."""
    runner, card, options = loaded.runner, loaded.card, loaded.options
    rows = {
        "model": f"{card.id} ({path.name}), up to {card.max_model_len} tokens",
        "numeric class": card.numeric_class + ("" if runner.exact else " (within rounding)"),
        "KV cache": f"{runner.num_blocks} blocks of {runner.block_size} tokens",
        "a step": f"up to {options.max_batch_tokens} tokens, {options.max_sequences} sequences",
        "loaded in": f"{loaded.seconds:.1f} s",
    }
    return rows | ({"passed over": loaded.passed_over} if loaded.passed_over else {})


def api_rows(settings: Settings, api: str, admin: str) -> dict[str, str]:
    """The banner's lines about the queue and the addresses. A queue's URL may hold a password."""
    queue = settings.queue.split("://", 1)[0]
    return {"queue": queue} | admin_rows(settings, admin) | {"API": f"{api}/v1"}


def admin_rows(settings: Settings, admin: str) -> dict[str, str]:
    """The banner's lines about the admin port, which may not be the default one."""
    moved = "admin_port" not in settings.model_fields_set and not admin.endswith(
        f":{settings.admin_port}"
    )
    note = {"admin port": f"{settings.admin_port} is taken; see metrics"} if moved else {}
    return {"metrics": f"{admin}/metrics"} | note


def banner(console: Console, settings: Settings, rows: dict[str, str]) -> None:
    """Says what is served, to a person or as one line of JSON."""
    if settings.log_format == "json":
        log.info("ready", extra={key.replace(" ", "_"): value for key, value in rows.items()})
        return
    console.print(f"[bold]Quire {VERSION}[/bold]")
    for name, value in rows.items():
        console.print(f"  [dim]{name:14}[/dim]{value}", highlight=False, soft_wrap=True)
