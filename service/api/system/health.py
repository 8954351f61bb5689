"""Probes: started, live, ready. They report progress, not load: a saturated server is healthy."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter, Response
from pydantic import Field

from service.api.answers import AnswerModel, described, json_response
from service.api.context import ApiContext, Context
from service.errors import Unavailable


class Health(AnswerModel):
    """The probe succeeded."""

    status: Literal["ok"] = Field(description="Always ok: everything else is an error.")


router = APIRouter(responses=described(Health))


@router.get("/health/startup")
async def startup(context: Context) -> Response:
    """Returns 200 once the weights are loaded."""
    if not context.probes.started():
        raise Unavailable("the server is starting", code="starting")
    return json_response({"status": "ok"})


@router.get("/health/live")
async def live(context: Context) -> Response:
    """Returns 200 while the engine makes progress or is idle. Does not depend on the queue."""
    if not context.probes.live():
        raise Unavailable("the engine makes no progress", code="stalled")
    return json_response({"status": "ok"})


@router.get("/health/ready")
async def ready(context: Context) -> Response:
    """Returns 200 while the server is started, not draining, and the queue accepts writes. A full
    queue is ready.
    """
    if not context.probes.started():
        raise Unavailable("the server is starting", code="starting")
    if context.probes.draining():
        raise Unavailable("this replica is shutting down", code="shutting_down")
    await _check_queue(context)
    return json_response({"status": "ok"})


@router.get("/health")
async def health(context: Context) -> Response:
    """Returns 200 while live, with the state of the queue and the number of engines."""
    if not context.probes.live():
        raise Unavailable("the engine makes no progress", code="stalled")
    try:
        await _check_queue(context)
        engines = len(await context.queue.engines())
    except Unavailable:
        return json_response({"status": "ok", "queue": "unreachable"})
    return json_response({"status": "ok", "queue": "ok", "engines": engines})


async def _check_queue(context: ApiContext) -> None:
    try:
        async with asyncio.timeout(context.limits.probe_timeout):
            await context.queue.check()
    except TimeoutError:
        raise Unavailable("the queue does not answer", code="backend_unavailable") from None
