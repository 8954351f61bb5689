"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.api.answers import described
from service.api.body import JsonRoute
from service.api.context import Caller, Context, JsonRequest
from service.api.generation.submit import answer
from service.api.openai.dialect import CHAT, COMPLETIONS
from service.api.openai.schema import ChatBody, ChatCompletion, Completion, CompletionBody

completions = APIRouter(route_class=JsonRoute)
chat = APIRouter(route_class=JsonRoute)


@completions.post("/v1/completions", responses=described(Completion, stream=True))
async def create_completion(
    body: CompletionBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Continues a text or token ids, or several of them. With `stream` the answer comes as
    server-sent events; its `x-request-id` identifies it to be resumed or cancelled.
    """
    return await answer(COMPLETIONS, body, request, context, tenant)


@chat.post("/v1/chat/completions", responses=described(ChatCompletion, stream=True))
async def create_chat_completion(
    body: ChatBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Answers the messages of a chat, using the model's chat template. With `stream` the answer
    comes as server-sent events; its `x-request-id` identifies it to be resumed or cancelled.
    """
    return await answer(CHAT, body, request, context, tenant)
