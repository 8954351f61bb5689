"""GET /status: live state of the engines and the depth of the queue, for the web page.

It reports load; the probes report health. Metrics for alerts are on the admin port.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from pydantic import Field

from service.api.answers import (
    AnswerModel,
    ContextLength,
    ModelId,
    NumericClass,
    described,
    json_response,
)
from service.api.context import Context
from service.api.system.attention_service import Attention
from service.api.system.live_state import Live

router = APIRouter()


class Status(AnswerModel):
    """Live state of the server."""

    model: ModelId
    max_model_len: ContextLength
    numeric_class: NumericClass
    version: str = Field(description="The server's version.")
    draining: bool = Field(description="Whether the replica is shutting down.")
    queue: dict[str, Any] | None = Field(
        description="The queue's depth; null if the queue is unreachable."
    )
    engines: list[dict[str, Any]] = Field(description="The latest heartbeat of each engine.")


@router.get("/status", responses=described(Status))
async def show_status(context: Context, live: Live, attention: Attention) -> Response:
    """The model, the queue's depth (null if the queue is unreachable), and the latest heartbeat of
    each engine.
    """
    card = context.card
    status = {
        "model": card.id,
        "max_model_len": card.max_model_len,
        "numeric_class": card.numeric_class,
        "version": context.version,
        "max_attention_tokens": context.limits.max_attention_tokens if attention else None,
        "draining": context.probes.draining(),
        "queue": None,
        "engines": [],
    }
    state = await live.read()
    if state is not None:
        depth, engines = state
        status |= {"queue": asdict(depth), "engines": [asdict(engine) for engine in engines]}
    return json_response(status, headers={"cache-control": "no-store"})
