"""The HTTP API: OpenAI's endpoints, resumable streams, probes. JSON and SSE stay in here.

    body, fields, schemas      bytes -> JSON -> wire types                     [400, 413, 415]
    prompts, sampling          wire types -> token ids, sampling parameters    [400]
    tools, tool_prompt         functions, put to the model                     [400]
    chat_grammar               what the answer must match                 [400, 429, 503]
    admission                  -> Submission -> queue                          [409, 429, 503]
    answer, relay, pieces      journal -> what is shown of each choice; tool_calls: its calls
    events, sse | whole        -> server-sent events, or their sum as one JSON body
    attendance, resume         readers that leave, that come back, here or at another replica
    document, docs             all of this for machines: /openapi.json, held to what is served
    attention                  beside all that: what the network looks at, one map at a time

It talks to the queue's Protocol alone: no engine, no tensors, no metrics library.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fastapi import APIRouter

from service.api.anthropic import routes as messages
from service.api.generation import routes as streams
from service.api.openai import chat, completions
from service.api.responses import routes as responses
from service.api.system import attention, health, models, openapi, page, status
from service.api.system import tokenize as tokens

ROUTERS: Mapping[str, APIRouter] = MappingProxyType({
    "completions": completions.router,
    "chat": chat.router,
    "responses": responses.router,
    "messages": messages.router,
    "streams": streams.router,
    "models": models.router,
    "tokens": tokens.router,
    "attention": attention.router,
    "health": health.router,
    "status": status.router,
    "page": page.router,
    "docs": openapi.router,
})  # fmt: skip
"""Group of endpoints -> its routes, all on the public port."""
