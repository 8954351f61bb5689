"""ApiContext: all that a handler may reach. Made once by `build_app`, read by one dependency."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from model.text.tokenizer import Tokenizer
from service.api.auth import Tenant
from service.api.limits import ApiLimits
from service.api.observer import ApiObserver
from service.api.pools import WorkPools
from service.api.readers import Readers
from service.api.structured.validator import GrammarValidator
from service.messages import ModelCard
from service.queues import Queue


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """What the process says of itself. None of these may block."""

    started: Callable[[], bool]  # weights are loaded
    live: Callable[[], bool]  # the engine's step counter moved, or there is nothing to do
    draining: Callable[[], bool]  # on its way out: takes no new calls
    served: Callable[[], bool]  # an engine was heard of lately
    tokens_per_second: Callable[[], float]  # measured lately, all engines; 0 where unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiContext:
    """The parts that the endpoints work with."""

    queue: Queue
    tokenizer: Tokenizer
    read_card: Callable[[], ModelCard]  # an API replica learns of its engines' model as it runs
    limits: ApiLimits
    observer: ApiObserver
    probes: Probes
    pools: WorkPools
    readers: Readers
    grammars: GrammarValidator
    version: str
    replay_turns: asyncio.Lock = field(default_factory=asyncio.Lock)  # see `generation.follow`
    closing: asyncio.Event = field(default_factory=asyncio.Event)  # open answers end now

    @property
    def card(self) -> ModelCard:
        """What is served now."""
        return self.read_card()


def get_context(request: Request) -> ApiContext:
    """The context of the app that serves this request."""
    context = request.app.state.context
    assert isinstance(context, ApiContext)  # noqa: S101  # build_app puts it there
    return context


def get_tenant(request: Request) -> Tenant:
    """Who calls, as `boundary.Boundary` found out."""
    tenant = request.state.tenant
    assert isinstance(tenant, Tenant)  # noqa: S101  # the boundary puts it there
    return tenant


# FastAPI calls a dependency that is no coroutine in a thread of a pool that all calls share.
async def _provide_context(request: Request) -> ApiContext:
    return get_context(request)


async def _provide_tenant(request: Request) -> Tenant:
    return get_tenant(request)


Context = Annotated[ApiContext, Depends(_provide_context)]
Caller = Annotated[Tenant, Depends(_provide_tenant)]
