"""Calls whose answer is one result and never a stream: encodings and decisions.

Each is a submission like any other. The result is a function of the manifest and the journal, so
that any replica can render it again, by the id of the call.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import orjson
from fastapi import Request, Response

from service.api.generation.deltas import Accumulator
from service.api.generation.manifest import (
    DecisionNote,
    EncodingNote,
    Endpoint,
    Manifest,
    PromptNote,
)
from service.api.generation.reader import AnswerReader
from service.api.generation.request import Call
from service.api.generation.streams import find_call, resumed_reader
from service.api.generation.submit import CLIENT_LEFT, collected, submit
from service.api.http.auth import Tenant
from service.api.http.context import ApiContext, ModelContext
from service.api.http.errors import error_body
from service.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    GenerationFailed,
    NotFound,
    QuireError,
)
from service.messages import FinishReason, GenerationRequest, Submission
from service.queues.admission import submission_cost

Render = Callable[[AnswerReader, Sequence[Accumulator], str], Awaitable[bytes]]
"""The result as JSON, from the complete choices, for a tenant."""


def result_submission(
    requests: Sequence[GenerationRequest],
    prompts: Sequence[PromptNote],
    note: EncodingNote | DecisionNote,
    context: ModelContext,
    call: Call,
    *,
    endpoint: Endpoint,
    param: str,
    counted: str = "the inputs of one call",
    prefixes: tuple[tuple[str, ...], ...] = (),
) -> Submission:
    """`prompts`: one per request. Raises BadRequest with this `param` if `counted` have more tokens
    than the queue takes.
    """
    limits = context.limits
    alone = note.background or call.is_line
    grace = None if alone else limits.grace if call.idempotency_key else 0.0
    manifest = Manifest(
        endpoint=endpoint,
        prompts=tuple(prompts),
        created=int(time.time()),
        model=context.card.id,
        model_key=context.card.key,
        fingerprint=context.card.numeric_class,
        logprobs=0 if isinstance(note, DecisionNote) else None,
        encoding=note if isinstance(note, EncodingNote) else None,
        decision=note if isinstance(note, DecisionNote) else None,
        grace=grace,
    )
    submission = Submission(
        id=call.id,
        tenant=call.tenant.name,
        requests=tuple(requests),
        manifest=manifest.to_json(),
        model=context.card.id,
        idempotency_key=call.idempotency_key,
        fingerprint=call.fingerprint,
        allowance=call.tenant.allowance,
        keep=limits.keep_responses if note.background else None,
        prefixes=prefixes,
        grace=None if grace is None else grace or limits.replica_grace,
    )
    most = context.queue.limits.max_tokens
    if submission_cost(submission) > most:
        raise BadRequest(
            f"{counted} may have at most {most} tokens together",
            code="context_length_exceeded",
            param=param,
        )
    return submission


def max_requests(context: ModelContext, call: Call) -> int:
    """Requests that a call may have: one with more would be refused each time."""
    limits, allowance = context.queue.limits, call.tenant.allowance
    most = min(limits.max_requests, limits.max_per_tenant)
    own = None if allowance is None else allowance.max_in_flight
    return most if own is None else min(most, own)


async def answer_result(
    submission: Submission, request: Request, context: ModelContext, call: Call, render: Render
) -> Response:
    """The result; of a call in the background its state. Raises as `submit` and `render` do."""
    reader = await submit(submission, request, context, call)
    tenant = call.tenant.name
    if _note(reader).background:
        return await show_result(reader, render, tenant=tenant)
    choices = await collected(reader, request)
    if choices is None:
        return Response(status_code=CLIENT_LEFT)
    return _json(await render(reader, choices, tenant))


async def find_result(
    call_id: str, request: Request, context: ApiContext, tenant: Tenant, *, kind: type[Any]
) -> AnswerReader:
    """A reader of an earlier call whose note is of this kind. Raises NotFound or Gone."""
    unknown = NotFound("there is no such call", code="call_not_found")
    try:
        stored = await find_call(call_id, context, tenant)
    except NotFound:  # it says that no stream has this id
        raise unknown from None
    manifest = Manifest.from_json(stored.manifest)
    if not isinstance(manifest.result_note, kind):
        raise unknown
    await context.queue.heartbeat([stored.id])
    return resumed_reader(stored.id, manifest, request, context, tenant)


async def show_result(reader: AnswerReader, render: Render, *, tenant: str) -> Response:
    """The object of a call, up to the current end of its journal."""
    failure: QuireError | None = None
    result = b"null"
    try:
        choices = await reader.collect_now()
        if reader.ended:
            result = await render(reader, choices, tenant)
    except (GenerationFailed, DeadlineExceeded, Conflict) as error:
        failure = error
    note = _note(reader)
    fields: Mapping[str, Any] = {
        "id": reader.id,
        "object": "encoding" if isinstance(note, EncodingNote) else "decision",
        "endpoint": reader.manifest.endpoint.value,
        "created": reader.manifest.created,
        "model": reader.context.card.id,
        "status": _status(reader, failure),
        "inputs": note.num_inputs,
        "completed": reader.completion_tokens,
        "error": None if failure is None else orjson.loads(error_body(failure))["error"],
    }
    return _json(orjson.dumps(fields)[:-1] + b',"result":' + result + b"}")


def ensure_complete(choices: Sequence[Accumulator]) -> None:
    """Raises DeadlineExceeded or Conflict if a choice has no result."""
    for choice in choices:
        reason = None if choice.end is None else choice.end.reason
        if reason is FinishReason.DEADLINE:
            raise DeadlineExceeded("the result was not complete before the deadline")
        if reason in {None, FinishReason.CANCELLED}:
            raise Conflict("the call was cancelled", retryable=False)


def _note(reader: AnswerReader) -> Any:  # noqa: ANN401  # such a call has one
    return reader.manifest.result_note


def _status(reader: AnswerReader, failure: QuireError | None) -> str:
    if failure is not None:
        return "cancelled" if isinstance(failure, Conflict) else "failed"
    if reader.ended:
        return "completed"
    return "in_progress" if reader.completion_tokens else "queued"


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
