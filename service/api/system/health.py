"""Probes and GET /status.

The probes (started, live, ready) report progress, not load: a saturated server is healthy. The
status reports load, for the web page. Metrics for alerts are on the admin port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import Field

from service.api.http.context import ApiContext, Context, Probes, ServedModel, from_app
from service.api.http.models import (
    AnswerModel,
    ContextLength,
    ModelId,
    NumericClass,
    described,
    json_response,
)
from service.errors import Unavailable
from service.queues.contract import EngineInfo, Queue, QueueDepth

MAX_AGE = 0.2  # seconds for which callers share a reading

status_router = APIRouter()


class LiveState:
    """The requests that are running and waiting now, or MAX_AGE ago."""

    def __init__(self, queue: Queue, *, clock: Callable[[], float] = monotonic) -> None:
        self._queue = queue
        self._clock = clock
        self._reading = asyncio.Lock()
        self._read_at: float | None = None
        self._latest: tuple[QueueDepth, Sequence[EngineInfo]] | None = None

    async def read(self) -> tuple[QueueDepth, Sequence[EngineInfo]] | None:
        """Returns depth and engines; None if the queue is unreachable."""
        async with self._reading:
            if self._read_at is None or self._clock() - self._read_at >= MAX_AGE:
                try:
                    self._latest = await self._queue.depth(), await self._queue.engines()
                except Unavailable:
                    self._latest = None
                self._read_at = self._clock()
        return self._latest


Live = Annotated[LiveState, from_app("live")]


class ServerStatus(AnswerModel):
    """Live state of the server."""

    model: ModelId
    max_model_len: ContextLength
    numeric_class: NumericClass
    models: list[dict[str, Any]] = Field(
        description="Each model: its card, whether an engine serves it, and its load."
    )
    version: str = Field(description="The server's version.")
    draining: bool = Field(description="Whether the replica is shutting down.")
    queue: dict[str, Any] | None = Field(
        description="The queue's depth; null if the queue is unreachable."
    )
    engines: list[dict[str, Any]] = Field(description="The latest heartbeat of each engine.")


@status_router.get("/status", responses=described(ServerStatus))
async def show_status(context: Context, live: Live) -> Response:
    """The models, the queue's depth (null if the queue is unreachable), and the latest heartbeat of
    each engine. The card at the top is that of the first model.
    """
    card = context.models.first.card
    status = {
        "model": card.id,
        "max_model_len": card.max_model_len,
        "numeric_class": card.numeric_class,
        "models": [_model_status(model, context) for model in context.models.table.values()],
        "version": context.version,
        "max_attention_tokens": _attention_limit(context.models.first, context),
        "draining": context.probes.draining(),
        "queue": None,
        "engines": [],
    }
    state = await live.read()
    if state is not None:
        depth, engines = state
        status |= {"queue": asdict(depth), "engines": [asdict(engine) for engine in engines]}
    return json_response(status, headers={"cache-control": "no-store"})


def _model_status(model: ServedModel, context: ApiContext) -> dict[str, Any]:
    card = model.card
    return {
        "id": card.id,
        "kind": model.kind.value,
        "served": model.served(),
        "max_model_len": card.max_model_len,
        "numeric_class": card.numeric_class,
        "max_attention_tokens": _attention_limit(model, context),
        "tokens_per_second": model.tokens_per_second(),
    }


def _attention_limit(model: ServedModel, context: ApiContext) -> int | None:
    return None if model.attention is None else context.limits.max_attention_tokens


class Health(AnswerModel):
    """The probe succeeded."""

    status: Literal["ok"] = Field(description="Always ok: everything else is an error.")


@dataclass(frozen=True, slots=True)
class HealthContext:
    """What the probes report on. `app.state.health` has it."""

    queue: Queue
    probes: Probes
    models: Callable[[], dict[str, str]] = dict  # the state of each model, by its name
    timeout: float = 1.0  # seconds that the queue has to answer a check

    async def check_queue(self) -> None:
        """Raises Unavailable unless the queue accepts writes."""
        try:
            async with asyncio.timeout(self.timeout):
                await self.queue.check()
        except TimeoutError:
            raise Unavailable("the queue does not answer", code="backend_unavailable") from None


Checked = Annotated[HealthContext, from_app("health")]

router = APIRouter(responses=described(Health))


@router.get("/health/startup")
async def startup(context: Checked) -> Response:
    """Returns 200 once the weights are loaded."""
    if not context.probes.started():
        raise Unavailable("the server is starting", code="starting")
    return json_response({"status": "ok"})


@router.get("/health/live")
async def live(context: Checked) -> Response:
    """Returns 200 while the engine makes progress or is idle. Does not depend on the queue."""
    if not context.probes.live():
        raise Unavailable("the engine makes no progress", code="stalled")
    return json_response({"status": "ok"})


@router.get("/health/ready")
async def ready(context: Checked) -> Response:
    """Returns 200 while the server is started, not draining, and the queue accepts writes. A full
    queue is ready, and so is a replica some of whose models have no engine now.
    """
    if not context.probes.started():
        raise Unavailable("the server is starting", code="starting")
    if context.probes.draining():
        raise Unavailable("this replica is shutting down", code="shutting_down")
    await context.check_queue()
    return json_response({"status": "ok", "models": context.models()})


@router.get("/health")
async def health(context: Checked) -> Response:
    """Returns 200 while live, with the state of the queue and of each model, and the number of
    engines.
    """
    if not context.probes.live():
        raise Unavailable("the engine makes no progress", code="stalled")
    try:
        await context.check_queue()
        engines = sum(group.engines for group in await context.queue.engine_groups())
    except Unavailable:
        return json_response({"status": "ok", "queue": "unreachable"})
    models = context.models()
    return json_response({"status": "ok", "queue": "ok", "engines": engines, "models": models})
