"""Probes: started, alive, ready. They tell of progress, not of load: saturated is not dead."""

from __future__ import annotations

import asyncio

import orjson
from fastapi import APIRouter, Response

from service.api.context import ApiContext, Context
from service.errors import Unavailable

router = APIRouter()


def _ok(**fields: object) -> Response:
    return Response(orjson.dumps({"status": "ok", **fields}), media_type="application/json")


@router.get(
    "/health/startup",
    summary="Has it started?",
    description="200 once the weights are loaded.",
    response_model=None,
)
async def startup(context: Context) -> Response:
    """Weights are loaded."""
    if not context.probes.started():
        raise Unavailable("the server is starting", code="starting")
    return _ok()


@router.get(
    "/health/live",
    summary="Does it make progress?",
    description="200 while the engine steps or has nothing to do. Does not depend on the queue.",
    response_model=None,
)
async def live(context: Context) -> Response:
    """It makes progress."""
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
async def ready(context: Context) -> Response:
    """It takes calls."""
    if not context.probes.started():
        raise Unavailable("the server is starting", code="starting")
    if context.probes.draining():
        raise Unavailable("this replica is shutting down", code="shutting_down")
    await _check_queue(context)
    return _ok()


@router.get(
    "/health",
    summary="All of it",
    description="200 while alive; reports whether the queue takes writes, and how many engines "
    "there are.",
    response_model=None,
)
async def health(context: Context) -> Response:
    """Alive, and in what state."""
    if not context.probes.live():
        raise Unavailable("the engine makes no progress", code="stalled")
    try:
        await _check_queue(context)
        engines = len(await context.queue.engines())
    except Unavailable:
        return _ok(queue="unreachable")
    return _ok(queue="ok", engines=engines)


async def _check_queue(context: ApiContext) -> None:
    try:
        async with asyncio.timeout(context.limits.probe_timeout):
            await context.queue.check()
    except TimeoutError:
        raise Unavailable("the queue does not answer", code="backend_unavailable") from None
