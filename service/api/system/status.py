"""GET /status: live state of the engines and the depth of the queue, for the web page.

It reports load; the probes report health. Metrics for alerts are on the admin port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import monotonic
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
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
from service.api.system.attention import Attention
from service.errors import Unavailable
from service.queues.contract import EngineInfo, Queue, QueueDepth

MAX_AGE = 0.2  # seconds for which callers share a reading

router = APIRouter()


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


async def _live_state(request: Request) -> LiveState:
    state = request.app.state.live
    assert isinstance(state, LiveState)  # noqa: S101  # build_app puts it there
    return state


Live = Annotated[LiveState, Depends(_live_state)]


class ServerStatus(AnswerModel):
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


@router.get("/status", responses=described(ServerStatus))
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
