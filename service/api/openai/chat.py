"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.api.answers import described
from service.api.body import JsonRequest, JsonRoute
from service.api.context import Caller, Context
from service.api.generation.respond import answer_chat
from service.api.openai.answers import ChatCompletion
from service.api.openai.schema import ChatBody

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=described(ChatCompletion, stream=True),
    summary="Answer a chat",
    description="Answers the messages of a chat, through the model's own chat template. With "
    "`stream` the answer comes as server-sent events; its `x-request-id` is what it can be resumed "
    "or cancelled by.",
)
async def create_chat_completion(
    body: ChatBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """A chat as it is."""
    return await answer_chat(body, request, context, tenant)
