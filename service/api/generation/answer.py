"""The way of a generating call, the same for all dialects: parse, plan, submit, answer."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request, Response

from service.api.auth import Tenant, with_tokens
from service.api.call import unless_gone
from service.api.context import ApiContext, JsonRequest
from service.api.generation.dialect import Dialect
from service.api.generation.grammar import grammar_of
from service.api.generation.plan import plan
from service.api.generation.prompts import prompt_tokens
from service.api.generation.reader import AnswerReader
from service.api.generation.request import Call, Generation, read_call
from service.api.generation.sse import EventStream
from service.api.generation.submit import admit, check_model
from service.errors import QuireError, Unavailable
from service.messages import Submission

Body = TypeVar("Body")


async def answer(
    dialect: Dialect[Body],
    body: Body,
    request: JsonRequest,
    context: ApiContext,
    tenant: Tenant,
) -> Response:
    """The answer as a stream or a body. Raises every 4xx and 503 before anything is sent."""
    generation = dialect.parse(body)
    ensure_accepting(generation, context)
    call = read_call(request, tenant, context.limits)
    prompts = await prompt_tokens(generation, context, tenant=tenant.name)
    grammar = await grammar_of(generation, context, tenant=tenant.name)
    submission = plan(
        generation, prompts, context, endpoint=dialect.name, call=call, grammar=grammar
    )
    reader = await _submit(submission, request, context, call)
    if reader.manifest.stream:
        return EventStream(reader, dialect.stream(reader, event_ids=call.event_ids))
    if reader.manifest.background:
        return _json(dialect.collect(reader, await reader.collect_now()))
    return await _collected(dialect, reader, request)


def ensure_accepting(generation: Generation, context: ApiContext) -> None:
    """Raises Unavailable or NotFound if the request cannot be served, before it costs anything."""
    if context.probes.draining():
        raise Unavailable("this replica is shutting down", code="shutting_down", retry_after=1)
    check_model(generation.model, context)
    if not context.probes.served():
        context.observer.call_unserved()
        raise Unavailable("no engine is available", code="backend_unavailable")


async def _submit(
    submission: Submission, request: Request, context: ApiContext, call: Call
) -> AnswerReader:
    reply = await context.queue.submit(submission)
    request.state.usage = with_tokens(getattr(request.state, "usage", None), reply.usage)
    call_id, manifest = await admit(submission, reply, context)
    request.state.request_id = call_id  # the client resumes by it, also if it is an earlier call's
    return AnswerReader(
        call_id,
        manifest,
        context,
        tenant=call.tenant.name,
        arrived=call.arrived,
        submission=submission if call_id == submission.id else None,
    )


async def _collected(dialect: Dialect[Body], reader: AnswerReader, request: Request) -> Response:
    failure: QuireError | None = None
    try:
        with reader.connected():
            closing = reader.context.closing
            choices = await unless_gone(reader.collect(), request.receive, closing=closing)
            if choices is None and closing.is_set():
                raise reader.interrupt(streamed=False)
    except QuireError as error:
        failure = error
        raise
    finally:
        reader.report(streamed=False, error=failure)
    if choices is None:
        return Response(status_code=499)  # the client has left
    return _json(dialect.collect(reader, choices))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
