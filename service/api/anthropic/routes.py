"""POST /v1/messages and POST /v1/messages/count_tokens, for Anthropic's clients."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.api.answers import described, json_response, refused
from service.api.anthropic.answers import AnthropicMessage, MessageCount, MessageErrorBody
from service.api.anthropic.dialect import MESSAGES
from service.api.anthropic.parse import NAMES, parse_chat
from service.api.anthropic.schema import CountBody, MessageBody
from service.api.body import JsonRoute
from service.api.context import Caller, Context, JsonRequest
from service.api.generation.answer import answer
from service.api.generation.prompts import render_chat
from service.api.generation.submit import check_model

router = APIRouter(route_class=JsonRoute, responses=refused(MessageErrorBody))


@router.post(
    "/v1/messages",
    responses=described(AnthropicMessage, stream=True),
    summary="Create a message",
    description="Answers a chat in the form of Anthropic's API, errors included. With `stream` the "
    "answer is server-sent events; it can be resumed or cancelled by its `x-request-id`.",
)
async def create_message(
    body: MessageBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    return await answer(MESSAGES, body, request, context, tenant)


@router.post(
    "/v1/messages/count_tokens",
    responses=described(MessageCount),
    summary="Count a message's tokens",
    description="Returns the number of tokens of a message's prompt.",
)
async def count_tokens(body: CountBody, context: Context, tenant: Caller) -> Response:
    check_model(body.model, context)
    prompt = await render_chat(parse_chat(body), context, tenant=tenant.name, names=NAMES)
    return json_response({"input_tokens": len(prompt.ids)})
