"""Probes: started, alive, ready. They report progress, not load: saturated is not dead."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Request, Response

from service.api.context import Probes
from service.errors import Unavailable
from service.queues.contract import Queue

router = APIRouter()


@dataclass(frozen=True, slots=True)
class HealthContext:
    """What the probes report on. `app.state.health` has it."""

    queue: Queue
    probes: Probes
    timeout: float = 1.0  # seconds that the queue has to answer a check

    async def check_queue(self) -> None:
        """Raises Unavailable unless the queue takes writes."""
        try:
            async with asyncio.timeout(self.timeout):
                await self.queue.check()
        except TimeoutError:
            raise Unavailable("the queue does not answer", code="backend_unavailable") from None


async def _provide_health(request: Request) -> HealthContext:
    context = request.app.state.health
    assert isinstance(context, HealthContext)  # noqa: S101  # `service.app` sets it
    return context


Checked = Annotated[HealthContext, Depends(_provide_health)]


def _ok(**fields: object) -> Response:
    return Response(orjson.dumps({"status": "ok", **fields}), media_type="application/json")


@router.get(
    "/health/startup",
    summary="Has it started?",
    description="200 once the weights are loaded.",
    response_model=None,
)
async def startup(context: Checked) -> Response:
    if not context.probes.started():
        raise Unavailable("the server is starting", code="starting")
    return _ok()


@router.get(
    "/health/live",
    summary="Does it make progress?",
    description="200 while the engine steps or has nothing to do. Does not depend on the queue.",
    response_model=None,
)
async def live(context: Checked) -> Response:
    if not context.probes.live():
        raise Unavailable("the engine makes no progress", code="stalled")
    return _ok()


@router.get(
    "/health/ready",
    summary="Does it take calls?",
    description="200 while it is started, not draining, and the queue takes writes. A full queue "
    "does.",
    response_model=None,
)
async def ready(context: Checked) -> Response:
    if not context.probes.started():
        raise Unavailable("the server is starting", code="starting")
    if context.probes.draining():
        raise Unavailable("this replica is shutting down", code="shutting_down")
    await context.check_queue()
    return _ok()


@router.get(
    "/health",
    summary="All of it",
    description="200 while alive; reports whether the queue takes writes, and how many engines "
    "there are.",
    response_model=None,
)
async def health(context: Checked) -> Response:
    if not context.probes.live():
        raise Unavailable("the engine makes no progress", code="stalled")
    try:
        await context.check_queue()
        engines = len(await context.queue.engines())
    except Unavailable:
        return _ok(queue="unreachable")
    return _ok(queue="ok", engines=engines)
