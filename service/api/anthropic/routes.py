"""POST /v1/messages and POST /v1/messages/count_tokens, for Anthropic's clients."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.api.answers import described, json_response, refused
from service.api.anthropic.dialect import MESSAGES, parse_chat
from service.api.anthropic.schema import (
    AnthropicMessage,
    CountBody,
    MessageBody,
    MessageCount,
    MessageErrorBody,
)
from service.api.body import JsonRoute
from service.api.context import Caller, Context, JsonRequest
from service.api.generation.prompts import render_chat
from service.api.generation.submit import answer, check_model

router = APIRouter(route_class=JsonRoute, responses=refused(MessageErrorBody))


@router.post("/v1/messages", responses=described(AnthropicMessage, stream=True))
async def create_message(
    body: MessageBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Answers a chat in the form of Anthropic's API, errors included. With `stream` the answer
    comes as server-sent events; its `x-request-id` identifies it to be resumed or cancelled.
    """
    return await answer(MESSAGES, body, request, context, tenant)


@router.post("/v1/messages/count_tokens", responses=described(MessageCount))
async def count_tokens(body: CountBody, context: Context, tenant: Caller) -> Response:
    """Returns the number of tokens of a message's prompt."""
    check_model(body.model, context)
    chat, names = parse_chat(body), MESSAGES.names
    prompt = await render_chat(chat, context, tenant=tenant.name, names=names)
    return json_response({"input_tokens": len(prompt.ids)})
