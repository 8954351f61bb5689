"""Probes: started, live, ready. They report progress, not load: a saturated server is healthy."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field

from service.api.answers import AnswerModel, described, json_response
from service.api.context import Probes
from service.errors import Unavailable
from service.queues.contract import Queue


class Health(AnswerModel):
    """The probe succeeded."""

    status: Literal["ok"] = Field(description="Always ok: everything else is an error.")


@dataclass(frozen=True, slots=True)
class HealthContext:
    """What the probes report on. `app.state.health` has it."""

    queue: Queue
    probes: Probes
    timeout: float = 1.0  # seconds that the queue has to answer a check

    async def check_queue(self) -> None:
        """Raises Unavailable unless the queue accepts writes."""
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
    queue is ready.
    """
    if not context.probes.started():
        raise Unavailable("the server is starting", code="starting")
    if context.probes.draining():
        raise Unavailable("this replica is shutting down", code="shutting_down")
    await context.check_queue()
    return json_response({"status": "ok"})


@router.get("/health")
async def health(context: Checked) -> Response:
    """Returns 200 while live, with the state of the queue and the number of engines."""
    if not context.probes.live():
        raise Unavailable("the engine makes no progress", code="stalled")
    try:
        await context.check_queue()
        engines = len(await context.queue.engines())
    except Unavailable:
        return json_response({"status": "ok", "queue": "unreachable"})
    return json_response({"status": "ok", "queue": "ok", "engines": engines})
