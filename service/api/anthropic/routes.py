"""POST /v1/messages, and how many tokens one would begin with: for Anthropic's clients."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Response

from service.api.answers import described, refused
from service.api.anthropic.answers import AnthropicMessage, MessageCount, MessageErrorBody
from service.api.anthropic.schema import CountBody, MessageBody, as_chat, as_prompt
from service.api.body import JsonRequest, JsonRoute
from service.api.context import Caller, Context
from service.api.generation.prompts import chat_prompt
from service.api.generation.respond import answer_chat
from service.api.generation.submit import check_model
from service.api.tools.plan import tool_use

router = APIRouter(route_class=JsonRoute, responses=refused(MessageErrorBody))


@router.post(
    "/v1/messages",
    response_model=None,
    responses=described(AnthropicMessage, stream=True),
    summary="Create a message",
    description="Answers a chat in the shape of Anthropic's API, its errors too. With `stream` the "
    "answer comes as server-sent events; its `x-request-id` is what it can be resumed or cancelled "
    "by.",
)
async def create_message(
    body: MessageBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """As a chat."""
    return await answer_chat(as_chat(body), request, context, tenant)


@router.post(
    "/v1/messages/count_tokens",
    response_model=None,
    responses=described(MessageCount),
    summary="Count a message's tokens",
    description="How many tokens the prompt of such a message has.",
)
async def count_tokens(body: CountBody, context: Context, tenant: Caller) -> Response:
    """Tokenise, count."""
    check_model(body.model, context)
    chat = as_prompt(body)
    prompt = await chat_prompt(chat, context, tenant=tenant.name, tools=tool_use(chat))
    count = orjson.dumps({"input_tokens": len(prompt.ids)})
    return Response(count, media_type="application/json")
