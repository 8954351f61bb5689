"""Answering a request: checks, submission to the queue, errors for rejections, and the response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import orjson
from fastapi import Request, Response

from service.api.generation.deltas import Accumulator
from service.api.generation.dialect import Dialect
from service.api.generation.manifest import Manifest
from service.api.generation.plan import grammar_of, plan
from service.api.generation.prompts import prompt_tokens
from service.api.generation.reader import AnswerReader
from service.api.generation.request import Call, Generation, read_call
from service.api.generation.streams import EventStream
from service.api.http.auth import Tenant, over_rate, with_tokens
from service.api.http.call import unless_gone
from service.api.http.context import ApiContext, ApiLimits, JsonRequest, ModelContext, ModelKind
from service.errors import (
    BadRequest,
    Conflict,
    Gone,
    QuireError,
    RateLimited,
    Unavailable,
)
from service.messages import Submission
from service.queues.admission import stored_bytes, submission_cost
from service.queues.contract import QueueLimits, SubmitReply, SubmitStatus

CLIENT_LEFT = 499
WARNING_HEADER = "x-quire-warning"
"""Names the known parts of a request that have no effect on this server."""


def ensure_accepting(
    name: str | None, context: ApiContext, *, kinds: Sequence[ModelKind]
) -> ModelContext:
    """The context of a request for the model of this name. Raises Unavailable, NotFound or, if the
    model is of none of these kinds, BadRequest.
    """
    if context.probes.draining():
        raise Unavailable("this replica is shutting down", code="shutting_down", retry_after=1)
    chosen = context.model(name)
    chosen.ensure_kind(*kinds)
    chosen.ensure_served()
    return chosen


def _check_echoed(generation: Generation, limits: ApiLimits) -> None:
    """Raises BadRequest for an echoed field that is too long to be stored."""
    for name, value in generation.echoed.items():
        if len(orjson.dumps(value)) > limits.max_echoed_bytes:
            raise BadRequest(
                f"{name} may have at most {limits.max_echoed_bytes} bytes as JSON",
                code="string_above_max_length",
                param=name,
            )


async def submit(
    submission: Submission, request: Request, context: ModelContext, call: Call
) -> AnswerReader:
    """A reader of the answer. Raises Unavailable, RateLimited, Conflict or Gone."""
    reply = await context.queue.submit(submission)
    request.state.usage = with_tokens(getattr(request.state, "usage", None), reply.usage)
    call_id, manifest = await _admitted(submission, reply, context)
    request.state.request_id = call_id  # the client resumes by it, also if it is an earlier call's
    return AnswerReader(
        call_id,
        manifest,
        context,
        tenant=call.tenant.name,
        arrived=call.arrived,
        submission=submission if call_id == submission.id else None,
    )


async def _admitted(
    submission: Submission, reply: SubmitReply, context: ModelContext
) -> tuple[str, Manifest]:
    """The id and the manifest of the submission to follow: this one, or the earlier one with the
    same idempotency key.
    """
    if reply.status is SubmitStatus.OK:
        context.observer.call_accepted(len(submission.requests), context.card.id)
    elif reply.status is not SubmitStatus.EXISTS:
        context.observer.call_refused(reply.status.value)
        raise _rejection(submission, reply, context)
    if reply.submission_id == submission.id:
        return submission.id, Manifest.from_json(submission.manifest)
    earlier = await context.queue.lookup(reply.submission_id)
    await context.queue.heartbeat([reply.submission_id])
    if earlier is None:
        raise Gone("the answer to this Idempotency-Key is no longer kept", retryable=False)
    return earlier.id, Manifest.from_json(earlier.manifest)


def _rejection(
    submission: Submission, reply: SubmitReply, context: ModelContext
) -> Conflict | RateLimited | Unavailable:
    if reply.status is SubmitStatus.CONFLICT:
        return Conflict("this Idempotency-Key came before with another body", retryable=False)
    if reply.status is SubmitStatus.RATE:
        return _over_rate(submission, reply)
    if reply.status in {SubmitStatus.STORAGE, SubmitStatus.TENANT_STORAGE}:
        return _over_storage(submission, reply.status, context.queue.limits)
    speed = context.served.tokens_per_second()
    wait = reply.queued_tokens / speed if speed > 0 else 1.0
    if reply.status is SubmitStatus.TENANT:
        return RateLimited("you have too many requests in flight", retry_after=wait)
    return Unavailable("the queue is full", retry_after=wait)


def _over_storage(
    submission: Submission, status: SubmitStatus, limits: QueueLimits
) -> RateLimited | Unavailable:
    """Room comes with the end of a request or of a resume window, whichever is first."""
    wait = limits.resume_window
    if status is SubmitStatus.STORAGE:
        message = f"stored requests may have at most {limits.max_bytes} bytes in total"
        return Unavailable(message, code="storage_full", retry_after=wait)
    most, size = limits.max_tenant_bytes, stored_bytes(submission)
    if size > most:
        message = f"the request takes {size} bytes to store, and you may have at most {most}"
        return RateLimited(message, retryable=False)
    return RateLimited(f"your stored requests may have at most {most} bytes", retry_after=wait)


def _over_rate(submission: Submission, reply: SubmitReply) -> RateLimited:
    usage, cost = reply.usage, submission_cost(submission)
    if usage.tokens is not None and cost > usage.tokens.limit:
        return RateLimited(
            f"the request counts {cost} tokens, and this key has {usage.tokens.limit} per minute",
            retryable=False,
        )
    return over_rate(usage)


Body = TypeVar("Body")


async def answer(
    dialect: Dialect[Body],
    body: Body,
    request: JsonRequest,
    context: ApiContext,
    tenant: Tenant,
) -> Response:
    """The answer as a stream or a body. Raises every 4xx and 503 before anything is sent."""
    return await answer_generation(dialect, dialect.parse(body), request, context, tenant)


async def answer_generation(
    dialect: Dialect[Body],
    generation: Generation,
    request: JsonRequest,
    context: ApiContext,
    tenant: Tenant,
) -> Response:
    """As `answer`, for a body that was parsed before."""
    chosen = ensure_accepting(generation.model, context, kinds=[ModelKind.GENERATE])
    _check_echoed(generation, context.limits)
    call = read_call(request, tenant, context.limits)
    prompts = await prompt_tokens(generation, chosen, tenant=tenant.name)
    grammar = await grammar_of(generation, chosen, tenant=tenant.name)
    submission = plan(
        generation, prompts, chosen, endpoint=dialect.name, call=call, grammar=grammar
    )
    reader = await submit(submission, request, chosen, call)
    response = await _response(dialect, reader, request, event_ids=call.event_ids)
    if generation.warnings:
        response.headers[WARNING_HEADER] = ", ".join(generation.warnings)
    return response


async def _response(
    dialect: Dialect[Body], reader: AnswerReader, request: Request, *, event_ids: bool
) -> Response:
    if reader.manifest.stream:
        return EventStream(reader, dialect.stream(reader, event_ids=event_ids))
    if reader.manifest.background:
        return _json(dialect.collect(reader, await reader.collect_now()))
    choices = await collected(reader, request)
    return (
        Response(status_code=CLIENT_LEFT)
        if choices is None
        else _json(dialect.collect(reader, choices))
    )


async def collected(reader: AnswerReader, request: Request) -> list[Accumulator] | None:
    """All choices, complete; None if the client left. Raises as `AnswerReader.collect` does."""
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
    return choices


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
