"""The way of a generating call, the same for all dialects: parse, plan, submit, answer."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request, Response

from service.api.auth import Tenant
from service.api.call import unless_gone
from service.api.context import ApiContext, JsonRequest
from service.api.generation.dialect import Dialect
from service.api.generation.grammar import grammar_of
from service.api.generation.plan import plan
from service.api.generation.prompts import prompt_tokens
from service.api.generation.reader import AnswerReader
from service.api.generation.request import read_call
from service.api.generation.sse import EventStream
from service.api.generation.submit import ensure_accepting, submit
from service.errors import QuireError

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
    reader = await submit(submission, request, context, call)
    if reader.manifest.stream:
        return EventStream(reader, dialect.stream(reader, event_ids=call.event_ids))
    if reader.manifest.background:
        return _json(dialect.collect(reader, await reader.collect_now()))
    return await _collected(dialect, reader, request)


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
