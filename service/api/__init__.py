"""The HTTP API: OpenAI's and Anthropic's endpoints, resumable streams, probes. JSON and SSE stay in
here.

    http.body, fields; schema     bytes -> JSON -> a dialect's body               [400, 413, 415]
    dialect.parse                 body -> Generation, in no dialect's terms       [400]
    generation.prompts, grammar   token ids; what the output must match           [400, 429, 503]
    generation.plan, submit       -> Submission -> queue                          [409, 429, 503]
    generation.reader             journal -> deltas
    dialect.stream, collect       deltas -> server-sent events, or one JSON body

`generation` knows no dialect. A new dialect is a folder and a line of `DIALECTS`. The API talks to
the queue's Protocol alone: no engine, no tensors, no metrics library.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter

from service.api.anthropic import dialect as anthropic
from service.api.encoding import routes as encoding
from service.api.generation.dialect import Dialect
from service.api.generation.manifest import Endpoint
from service.api.generation.streams import stream_routes
from service.api.openai import dialect as openai
from service.api.responses import decisions
from service.api.responses import routes as responses
from service.api.responses.dialect import RESPONSES
from service.api.system import attention, batches, files, health, models, openapi, page, usage

DIALECTS: Mapping[Endpoint, Dialect[Any]] = MappingProxyType({
    Endpoint.COMPLETIONS: openai.COMPLETIONS,
    Endpoint.CHAT: openai.CHAT,
    Endpoint.RESPONSES: RESPONSES,
    Endpoint.MESSAGES: anthropic.MESSAGES,
})  # fmt: skip


def dialect_of(path: str) -> Dialect[Any]:
    """The dialect of the errors at a path: that of its endpoint, else OpenAI's."""
    for dialect in DIALECTS.values():
        if path == dialect.path or path.startswith(dialect.path + "/"):
            return dialect
    return openai.CHAT


ROUTERS: Mapping[str, APIRouter] = MappingProxyType({
    "completions": openai.completions,
    "chat": openai.chat,
    "responses": responses.router,
    "messages": anthropic.router,
    "decisions": decisions.router,
    "encoding": encoding.router,
    "streams": stream_routes(DIALECTS),
    "files": files.router,
    "batches": batches.router,
    "usage": usage.router,
    "models": models.router,
    "tokens": models.tokens_router,
    "attention": attention.router,
    "health": health.router,
    "status": health.status_router,
    "page": page.router,
    "docs": openapi.router,
})  # fmt: skip
"""Group of endpoints -> its routes, all on the public port."""
