"""Roles: what each command is composed of. With `__main__` and `app`, the composition root.

    serve     API, queue and engines in one process; with a Redis queue, one of many
    api       an API replica: does not load torch
    engine    an engine replica: no public port

Each is one event loop; each model has its own engine, which runs its network in a thread. A role
ends on SIGTERM or SIGINT, as `service.http.drain` describes, and at once, with exit code 1, if an
engine fails.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import uvloop
from rich.console import Console

from service.banner import admin_rows, api_rows, engine_rows, print_banner
from service.cluster import Cluster
from service.errors import StartupError, Unavailable
from service.http.descriptors import make_connections
from service.http.drain import StopSignals, drain
from service.http.exposure import refuse_exposure
from service.http.listeners import Listener
from service.http.ports import address, bind_admin, bind_public
from service.models import cards_of, close_runners, load_cards, load_engines
from service.observability.logs import set_up_logging
from service.parts import (
    VERSION,
    ApiSide,
    EngineSide,
    api_model,
    api_model_of_files,
    connect_queue,
    engine_admin_app,
    make_metrics,
    open_keys,
    open_traces,
)
from service.queues.contract import Queue
from service.settings import Settings
from service.worker.worker import EngineFailure

if TYPE_CHECKING:
    from service.observability.otlp import OtlpTraces

log = logging.getLogger("quire")

Role = Callable[[Settings, Console], Coroutine[None, None, None]]


def run_role(role: Role, settings: Settings, *, console: Console) -> None:
    """Runs a role until it ends. Raises StartupError for an invalid configuration."""
    set_up_logging(settings.log_level, settings.log_format)
    end_at_once_on_signals(console)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(role(settings, console))
        except EngineFailure as failure:
            log.critical("engine failed; exiting", exc_info=failure.__cause__)
            sys.exit(1)


def end_at_once_on_signals(console: Console) -> None:
    """Makes signals end the process without waiting for threads, until the role serves."""

    def end(number: int, _frame: object) -> None:
        console.show_cursor()  # a progress bar hides it
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


async def serve(settings: Settings, console: Console) -> None:
    """API, queue and engines in one process."""
    refuse_exposure(settings)
    metrics, traces = make_metrics(settings, "serve"), open_traces(settings, "serve")
    keys = open_keys(settings, metrics)
    slots, admin_slots = make_connections(settings, observer=metrics)
    public, admin = bind_public(settings), bind_admin(settings)
    models = await asyncio.to_thread(load_engines, settings, console=console)
    queue = await connect_queue(settings, metrics)
    engines = [EngineSide(settings, each, queue, metrics, traces=traces) for each in models]
    api = ApiSide(
        settings,
        [api_model(settings, each, metrics) for each in models],
        queue,
        metrics,
        engines=engines,
        keys=keys,
        traces=traces,
    )
    listeners = [
        Listener(api.app, public, grace=None, connections=slots),  # `drain` limits the time
        Listener(api.admin_app, admin, connections=admin_slots),
    ]
    rows = engine_rows(models) | api_rows(settings, address(public), address(admin))
    ready = partial(print_banner, console, settings, rows, version=VERSION)
    await run_until_stopped(queue, listeners, api=api, engines=engines, traces=traces, ready=ready)
    close_runners(models)


async def serve_api(settings: Settings, console: Console) -> None:
    """An API replica over a shared queue."""
    refuse_exposure(settings)
    metrics, traces = make_metrics(settings, "api"), open_traces(settings, "api")
    keys = open_keys(settings, metrics)
    refuse_private_queue(settings)
    slots, admin_slots = make_connections(settings, observer=metrics)
    public, admin = bind_public(settings), bind_admin(settings)
    cards = await asyncio.to_thread(load_cards, settings, console=console)
    queue = await connect_queue(settings, metrics)
    models = [api_model_of_files(each) for each in cards]
    api = ApiSide(settings, models, queue, metrics, keys=keys, traces=traces)
    listeners = [
        Listener(api.app, public, grace=None, connections=slots),  # `drain` limits the time
        Listener(api.admin_app, admin, connections=admin_slots),
    ]
    rows = api_rows(settings, address(public), address(admin))
    ready = partial(print_banner, console, settings, rows, version=VERSION)
    await run_until_stopped(queue, listeners, api=api, traces=traces, ready=ready)


async def serve_engine(settings: Settings, console: Console) -> None:
    """An engine replica over a shared queue, with an admin port only; one engine per model."""
    refuse_private_queue(settings)
    metrics, traces = make_metrics(settings, "engine"), open_traces(settings, "engine")
    _, admin_slots = make_connections(settings, observer=metrics)
    admin = bind_admin(settings)
    models = await asyncio.to_thread(load_engines, settings, console=console)
    queue = await connect_queue(settings, metrics)
    engines = [EngineSide(settings, each, queue, metrics, traces=traces) for each in models]
    cluster = Cluster(queue, cards_of(models), observer=metrics)
    admin_app = engine_admin_app(settings, engines, queue, metrics)
    listeners = [Listener(admin_app, admin, connections=admin_slots)]
    rows = engine_rows(models) | admin_rows(settings, address(admin))
    ready = partial(print_banner, console, settings, rows, version=VERSION)
    await run_until_stopped(
        queue, listeners, engines=engines, cluster=cluster, traces=traces, ready=ready
    )
    close_runners(models)


def refuse_private_queue(settings: Settings) -> None:
    """Raises StartupError if other replicas could not reach the queue."""
    if settings.queue.startswith("memory:"):
        raise StartupError("api and engine replicas need a shared queue: --queue redis://...")


async def run_until_stopped(
    queue: Queue,
    listeners: Sequence[Listener],
    *,
    ready: Callable[[], None],
    api: ApiSide | None = None,
    engines: Sequence[EngineSide] = (),
    cluster: Cluster | None = None,
    traces: OtlpTraces | None = None,
) -> None:
    """Serves until a signal or the failure of an engine, then stops in order. `ready` is called
    when every port answers. With `api`, the first listener is the public one.

    New calls are refused and open ones end while the admin port still answers; then the engines
    release their remaining work. Raises EngineFailure, and StartupError if a port was taken after
    it was bound.
    """
    signals = StopSignals()
    serving = [asyncio.create_task(listener.listen()) for listener in listeners]
    working = [asyncio.create_task(engine.worker.run()) for engine in engines]
    stopping = asyncio.create_task(signals.first.wait())
    hurrying = asyncio.create_task(signals.second.wait())
    background = [stopping, hurrying, asyncio.create_task(announce(listeners, ready))]
    cluster = api.cluster if api else cluster
    if cluster:
        background.append(asyncio.create_task(cluster.watch()))
    if api and api.keys:
        background.append(asyncio.create_task(api.keys.watch()))
    # Objects that exist now live until the end: the garbage collector need not visit them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(700)  # Python's default, which `main` raises for the start
    await asyncio.wait([stopping, *working, *serving], return_when=asyncio.FIRST_COMPLETED)
    failed = any(task.done() for task in working)
    if api:
        api.draining = True
        await drain(
            listeners[0],
            serving[0],
            seconds=signals.time_to_drain(api.drain_timeout),
            hurry=[hurrying, *working],
            close_answers=api.close_responses,
        )
    else:
        release_work(engines)
    for listener in listeners[1:] if api else listeners:
        listener.stop(at_once=failed)
    await asyncio.gather(*serving, return_exceptions=True)
    release_work(engines)
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    try:
        await asyncio.gather(*working, *serving)  # all have ended: raises what they raised
    finally:
        with suppress(Unavailable):
            await queue.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)


def release_work(engines: Sequence[EngineSide]) -> None:
    """Makes each engine finish its step and release its requests, for other engines."""
    for engine in engines:
        engine.worker.drain()


async def announce(listeners: Sequence[Listener], ready: Callable[[], None]) -> None:
    """Calls `ready` when every port answers."""
    for listener in listeners:
        await listener.answering.wait()
    ready()
