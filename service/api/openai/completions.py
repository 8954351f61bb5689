"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.api.answers import described
from service.api.body import JsonRequest, JsonRoute
from service.api.generation.call import read_call
from service.api.context import Caller, Context
from service.api.generation.prompts import completion_prompts
from service.api.generation.respond import answer_call
from service.api.generation.submit import check_open, plan_call
from service.api.openai.answers import Completion
from service.api.openai.schema import CompletionBody
from service.api.structured.grammars import asked_grammar

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/completions",
    response_model=None,
    responses=described(Completion, stream=True),
    summary="Complete prompts",
    description="Continues a text or token ids, or several of them. With `stream` the answer comes "
    "as server-sent events; its `x-request-id` is what it can be resumed or cancelled by.",
)
async def create_completion(
    body: CompletionBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Parse, tokenise, plan, answer."""
    check_open(body, context)
    call = read_call(request, tenant, context.limits)
    prompts = await completion_prompts(body, context, tenant=tenant.name)
    grammar = await asked_grammar(body, context, tenant=tenant.name)
    submission = plan_call(body, prompts, context, call=call, grammar=grammar)
    return await answer_call(submission, context, call=call, request=request)
