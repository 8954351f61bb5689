"""The two ASGI applications: the API on the public port, metrics and probes on the admin port.

They receive all their parts as arguments and create none themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import cache, partial

from fastapi import APIRouter, FastAPI, Response
from starlette.routing import BaseRoute

from model.grammar import Grammars
from model.text.tokenizer import Tokenizer
from service.api import ROUTERS, dialect_of
from service.api.http import errors
from service.api.http.auth import Authenticator, open_to_all
from service.api.http.call import Readers
from service.api.http.context import (
    ApiContext,
    ApiLimits,
    AttentionReads,
    GrammarErrors,
    Models,
    Probes,
    ServedEncoder,
    ServedModel,
    WorkPools,
)
from service.api.http.middleware import HostCheck, RequestContextMiddleware, allow_origins, any_host
from service.api.http.models import ErrorBody, refused
from service.api.http.observer import ApiObserver
from service.api.structured.validator import GrammarValidator
from service.api.system import openapi, usage
from service.api.system.batches import BatchDesk, answer_line
from service.api.system.files import FileDesk
from service.api.system.health import HealthContext, LiveState
from service.batches.jobs import JobLimits, Jobs
from service.errors import Unavailable
from service.messages import ModelCard
from service.queues.contract import Queue


def served_model(
    tokenizer: Tokenizer | None,
    read_card: Callable[[], ModelCard],
    *,
    served: Callable[[], bool] = lambda: True,
    tokens_per_second: Callable[[], float] = lambda: 0.0,
    attention: AttentionReads | None = None,
    grammars: GrammarErrors | None = None,
    encoder: ServedEncoder | None = None,
) -> ServedModel:
    """A model that generates, whose grammars are validated over its own vocabulary, or an encoder,
    without a tokenizer of its own.
    """
    if tokenizer is not None and grammars is None:
        words = tokenizer

        def vocabulary() -> Grammars:
            size = read_card().vocab_size
            return Grammars(words.token_bytes, eos_ids=words.eos_ids, vocab_size=size)

        grammars = GrammarValidator(vocabulary)
    return ServedModel(
        tokenizer=tokenizer,
        grammars=grammars,
        encoder=encoder,
        read_card=read_card,
        served=served,
        tokens_per_second=tokens_per_second,
        attention=attention,
    )


def build_app(  # noqa: PLR0913  # the arguments are its parts
    queue: Queue,
    models: Models,
    *,
    probes: Probes,
    limits: ApiLimits,
    observer: ApiObserver,
    version: str,
    authenticate: Authenticator = open_to_all,
    extras: Collection[str] = ("page",),
    check_host: HostCheck = any_host,
    cors_origins: Sequence[str] = (),
    jobs: JobLimits | None = None,
) -> FastAPI:
    """The API. `extras` are optional routes: `docs` (/docs, /openapi.json) and `page` (the web
    page). Its lifespan sweeps the queue, sends heartbeats of the answers that are read here, and
    runs batches.
    """
    context = ApiContext(
        queue=queue,
        models=models,
        limits=limits,
        observer=observer,
        probes=probes,
        pools=WorkPools.of(limits, observer),
        readers=Readers(queue),
        version=version,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        chores = [
            asyncio.create_task(work.runner.run()),
            asyncio.create_task(sweep_forever(queue, interval=limits.sweep_interval)),
            asyncio.create_task(context.readers.send_heartbeats(limits.attend_interval)),
        ]
        try:
            yield
        finally:
            for model in models.table.values():
                if model.grammars is not None:
                    await asyncio.to_thread(model.grammars.close)
                if model.attention is not None:
                    model.attention.close()
            for chore in chores:
                chore.cancel()
            await asyncio.gather(*chores, return_exceptions=True)
            context.pools.close()
            work.close()

    routes = _routes(frozenset(extras))
    app = _new_app("Quire", version=version, lifespan=lifespan, routes=routes)
    app.state.context = context
    work = Jobs(jobs or JobLimits(), queue, partial(answer_line, app), draining=probes.draining)
    app.state.files = FileDesk(work.files, work.batches)
    app.state.batches = BatchDesk(work.batches, work.runner.wake)
    app.state.live = LiveState(queue)
    app.state.health = HealthContext(queue, probes, models.states)
    app.add_middleware(
        RequestContextMiddleware,
        authenticate=authenticate,
        observer=observer,
        error_formats=dialect_of,
        check_host=check_host,
        charge=queue.charge,
    )
    if cors_origins:
        allow_origins(app, cors_origins)
    openapi.install(app, context)
    return app


@cache
def _routes(extras: frozenset[str]) -> list[BaseRoute]:
    """The routes of the API, built once per process: FastAPI takes a millisecond for each."""
    api = APIRouter(responses=refused(ErrorBody))
    for group, router in ROUTERS.items():
        if group not in {"docs", "page"} or group in extras:
            api.include_router(router, tags=[group])
    return api.routes


def build_admin_app(
    health: HealthContext,
    *,
    version: str,
    render_metrics: Callable[[], bytes],
    check_host: HostCheck = any_host,
) -> FastAPI:
    """Metrics and probes, for a port that only the operator can reach."""
    app = _new_app("Quire admin", version=version)
    app.state.health = health
    app.add_middleware(
        RequestContextMiddleware,
        authenticate=open_to_all,
        observer=ApiObserver(),
        error_formats=dialect_of,
        check_host=check_host,
    )
    metrics = APIRouter()

    @metrics.get(
        "/metrics",
        summary="Metrics",
        description="All series, in Prometheus' text format.",
        response_model=None,
    )
    async def read_metrics() -> Response:
        return Response(render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(metrics, tags=["metrics"])
    app.include_router(usage.admin_router, tags=["usage"])
    app.include_router(ROUTERS["health"], tags=["health"])
    return app


async def sweep_forever(queue: Queue, *, interval: float) -> None:
    """Ends overdue and abandoned requests, of all replicas; retries while the queue is away."""
    while True:
        with suppress(Unavailable):
            await queue.sweep()
        await asyncio.sleep(interval)


def _new_app(
    title: str,
    *,
    version: str,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    routes: list[BaseRoute] | None = None,
) -> FastAPI:
    """An application that answers every error in the API's format."""
    app = FastAPI(
        title=title,
        version=version,
        lifespan=lifespan,
        routes=routes,
        openapi_url=None,
        redirect_slashes=False,
        responses=refused(ErrorBody),
    )
    errors.install(app, dialect_of)
    return app
