"""GET /status: the engines' live state and the queue's depth, for the page and for a quick look.

It tells of load where the probes tell of health. Figures for alerts are metrics, on the admin port.
"""

from __future__ import annotations

from dataclasses import asdict

import orjson
from fastapi import APIRouter, Response

from service.api.context import Context

router = APIRouter()


@router.get(
    "/status",
    summary="What runs and what waits",
    description="The model, the queue's depth (null where the queue cannot be reached), and what "
    "each engine said of itself within the last seconds.",
    response_model=None,
)
async def show_status(context: Context) -> Response:
    """The live state, as far as it can be read now."""
    card = context.card
    status = {
        "model": card.id,
        "max_model_len": card.max_model_len,
        "numeric_class": card.numeric_class,
        "version": context.version,
        "max_attention_tokens": context.limits.max_attention_tokens if context.attention else None,
        "draining": context.probes.draining(),
        "queue": None,
        "engines": [],
    }
    state = await context.live.read()
    if state is not None:
        depth, engines = state
        status |= {"queue": asdict(depth), "engines": [asdict(engine) for engine in engines]}
    headers = {"cache-control": "no-store"}
    return Response(orjson.dumps(status), media_type="application/json", headers=headers)
