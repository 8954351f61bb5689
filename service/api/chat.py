"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.api.admission import check_open, plan_call
from service.api.body import JsonRequest, JsonRoute
from service.api.call import read_call
from service.api.chat_grammar import chat_grammar
from service.api.context import Caller, Context
from service.api.prompts import chat_prompt
from service.api.respond import answer_call
from service.api.schemas import ANSWER, ChatBody
from service.api.tools import tool_use

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=ANSWER,
    summary="Answer a chat",
    description="Answers the messages of a chat, through the model's own chat template. With "
    "`stream` the answer comes as server-sent events; its `x-request-id` is what it can be resumed "
    "or cancelled by.",
)
async def create_chat_completion(
    body: ChatBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Parse, tokenise, plan, answer."""
    check_open(body, context)
    call = read_call(request, tenant, context.limits)
    tools = tool_use(body)
    prompt = await chat_prompt(body, context, tools=tools)
    grammar = await chat_grammar(body, context, tools=tools)
    submission = plan_call(body, [prompt], context, call=call, tools=tools, grammar=grammar)
    return await answer_call(submission, context, call=call, request=request)
