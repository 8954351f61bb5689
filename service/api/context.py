"""ApiContext: everything that handlers have access to. `build_app` makes it once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Self

from fastapi import Depends, Request
from pydantic import BaseModel

from model.text.tokenizer import Tokenizer
from service.api.auth import Tenant
from service.api.limits import ApiLimits
from service.api.observer import BUSY, ApiObserver
from service.api.readers import Readers
from service.api.structured.validator import GrammarValidator
from service.fair_pool import FairPool
from service.messages import ModelCard
from service.queues.contract import Queue


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """The state of the process. None of these may block."""

    started: Callable[[], bool] = lambda: True  # the weights are loaded
    live: Callable[[], bool] = lambda: True  # the engine makes progress or has nothing to do
    draining: Callable[[], bool] = lambda: False  # shutting down: accepts no new calls
    served: Callable[[], bool] = lambda: True  # an engine sent a heartbeat lately
    tokens_per_second: Callable[[], float] = lambda: 0.0  # of all engines; 0: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkPools:
    """Threads for work that clients cause, in one pool per kind. In each of them tenants take
    turns, and the waiting work is bounded in bytes.
    """

    bodies: FairPool  # parsing and validating JSON
    templates: FairPool  # chats to token ids, by the model's chat template
    tokens: FairPool  # text to token ids and back

    @classmethod
    def of(cls, limits: ApiLimits, observer: ApiObserver) -> Self:
        """Pools that start a thread when they first need one."""

        def pool(work: str, threads: int) -> FairPool:
            return FairPool(
                work,
                threads=threads,
                max_weight=limits.max_waiting_bytes,
                max_tenant_weight=limits.max_tenant_waiting_bytes,
                refused=partial(observer.call_refused, BUSY),
            )

        return cls(
            bodies=pool("parsing", 1),  # the interpreter lock allows no more
            templates=pool("the chat template", limits.text_threads),
            tokens=pool("tokenising", limits.text_threads),
        )

    def close(self) -> None:
        """Cancels waiting work; running work continues to its end."""
        for pool in (self.bodies, self.templates, self.tokens):
            pool.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiContext:
    """The parts that the endpoints work with."""

    queue: Queue
    tokenizer: Tokenizer
    read_card: Callable[[], ModelCard]  # an API replica gets its engines' model at run time
    limits: ApiLimits
    observer: ApiObserver
    probes: Probes
    pools: WorkPools
    readers: Readers
    grammars: GrammarValidator
    version: str
    replay_turns: asyncio.Lock = field(default_factory=asyncio.Lock)  # see `generation.follow`
    closing: asyncio.Event = field(default_factory=asyncio.Event)  # open connections end now

    @property
    def card(self) -> ModelCard:
        """The model that is served now."""
        return self.read_card()


class JsonRequest(Request):
    """A request whose body is already read and parsed; a long one is validated, too."""

    raw: bytes
    parsed: dict[str, Any] | BaseModel

    async def body(self) -> bytes:
        return self.raw

    async def json(self) -> dict[str, Any] | BaseModel:
        """The parsed object, or the validated model, which FastAPI accepts, too."""
        return self.parsed


def get_context(request: Request) -> ApiContext:
    """The context of the app that serves this request."""
    context = request.app.state.context
    assert isinstance(context, ApiContext)  # noqa: S101  # set by build_app
    return context


def get_tenant(request: Request) -> Tenant:
    """The tenant, as `middleware` authenticated it."""
    tenant = request.state.tenant
    assert isinstance(tenant, Tenant)  # noqa: S101  # set by the middleware
    return tenant


# FastAPI calls a dependency that is no coroutine in a thread of a pool that all calls share.
async def _provide_context(request: Request) -> ApiContext:
    return get_context(request)


async def _provide_tenant(request: Request) -> Tenant:
    return get_tenant(request)


Context = Annotated[ApiContext, Depends(_provide_context)]
Caller = Annotated[Tenant, Depends(_provide_tenant)]
