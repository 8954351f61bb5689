"""A generating call's way: a chat, whatever shape it came in, and any call's answer."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from service.api.auth import Tenant
from service.api.body import JsonRequest
from service.api.connection import unless_gone
from service.api.context import ApiContext
from service.api.generation.call import Call, read_call
from service.api.generation.prompts import chat_prompt
from service.api.generation.reader import AnswerReader
from service.api.generation.sse import EventStream
from service.api.generation.submit import admit, check_open, plan_call
from service.api.generation.writers import body_of, writer_of
from service.api.openai.schema import ChatBody
from service.api.rates import with_tokens
from service.api.structured.chat_grammar import chat_grammar
from service.api.tools.plan import tool_use
from service.errors import QuireError
from service.messages import Submission


async def answer_chat(
    chat: ChatBody,
    request: JsonRequest,
    context: ApiContext,
    tenant: Tenant,
    *,
    given_back: dict[str, Any] | None = None,
) -> Response:
    """Checks, tokenises, plans, answers. `given_back` where it asks for a response."""
    check_open(chat, context)
    call = read_call(request, tenant, context.limits)
    tools = tool_use(chat)
    prompt = await chat_prompt(chat, context, tenant=tenant.name, tools=tools)
    grammar = await chat_grammar(chat, context, tenant=tenant.name, tools=tools)
    submission = plan_call(
        chat,
        [prompt],
        context,
        call=call,
        given_back=given_back,
        tools=tools,
        grammar=grammar,
    )
    return await answer_call(submission, context, call=call, request=request)


async def answer_call(
    submission: Submission, context: ApiContext, *, call: Call, request: Request
) -> Response:
    """Submits and answers. Raises what `admit` raises, before anything was sent."""
    reply = await context.queue.submit(submission)
    request.state.usage = with_tokens(getattr(request.state, "usage", None), reply.usage)
    call_id, manifest = await admit(submission, reply, context)
    request.state.request_id = call_id  # what the client resumes by, if it is an earlier call's
    answer = AnswerReader(
        call_id,
        manifest,
        context,
        tenant=call.tenant.name,
        arrived=call.arrived,
        submission=submission if call_id == submission.id else None,
    )
    if manifest.background and not manifest.stream:
        return Response(body_of(answer, await answer.collect_now()), media_type="application/json")
    if manifest.stream:
        return EventStream(answer, writer_of(answer, event_ids=call.event_ids))
    return await _whole(answer, request)


async def _whole(answer: AnswerReader, request: Request) -> Response:
    failure: QuireError | None = None
    try:
        with answer.connected():
            closing = answer.context.closing
            found = await unless_gone(answer.collect(), request.receive, closing=closing)
            body = None if found is None else body_of(answer, found)
            if body is None and closing.is_set():
                raise answer.interrupt(streamed=False)
    except QuireError as error:
        failure = error
        raise
    finally:
        answer.report(streamed=False, error=failure)
    if body is None:
        return Response(status_code=499)  # the client has left
    return Response(body, media_type="application/json")
