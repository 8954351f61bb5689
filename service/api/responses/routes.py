"""POST /v1/responses, and what can be done with a response by its id.

A response is an answer like any other, under the id `resp_<call id>`: its state is what the journal
says, so any replica can tell it, stream it on from any event, cancel it or delete it.
"""

from __future__ import annotations

from typing import Annotated

import orjson
from fastapi import APIRouter, Path, Query, Request, Response

from service.api.answers import described
from service.api.auth import Tenant
from service.api.body import JsonRequest, JsonRoute
from service.api.context import ApiContext, Caller, Context
from service.api.generation.lookup import find_response
from service.api.generation.reader import AnswerReader
from service.api.generation.respond import answer_chat
from service.api.generation.resume import read_to
from service.api.generation.sse import EventStream
from service.api.generation.writers import body_of, response_writer
from service.api.responses.answers import ResponseDeleted, ResponseObject
from service.api.responses.schema import ResponseBody, as_chat, given_back
from service.api.responses.stream import ResponseRenderer, numbering
from service.errors import BadRequest
from service.messages import FinishReason

router = APIRouter(route_class=JsonRoute)

MAX_NUMBER = 10**9

ResponseId = Annotated[str, Path(description="The id of a response.")]


@router.post(
    "/v1/responses",
    response_model=None,
    responses=described(ResponseObject, stream=True),
    summary="Create a response",
    description="Answers a text or messages. With `background` at once and without a reader; with "
    "`stream` in server-sent events, each with the number that it can be resumed after.",
)
async def create_response(
    body: ResponseBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """As a chat."""
    echoed = given_back(body, max_bytes=context.limits.max_echoed_bytes)
    return await answer_chat(as_chat(body), request, context, tenant, given_back=echoed)


@router.get(
    "/v1/responses/{response_id}",
    response_model=None,
    responses=described(ResponseObject, stream=True),
    summary="Retrieve a response",
    description="A stored response as far as it has come; or with `stream` its events, all of them "
    "or those after a number.",
)
async def retrieve_response(  # each is a part of the request
    response_id: ResponseId,
    request: Request,
    context: Context,
    tenant: Caller,
    *,
    stream: Annotated[bool, Query(description="Events instead of the response.")] = False,
    starting_after: Annotated[
        int | None,
        Query(ge=0, le=MAX_NUMBER, description="The `sequence_number` of the last event seen."),
    ] = None,
) -> Response:
    """Find it; tell its state, or follow it from where the client was."""
    answer = await _find(response_id, request, context, tenant)
    if not stream:
        if starting_after is not None:
            raise BadRequest("starting_after needs stream to be true", param="starting_after")
        return Response(body_of(answer, await answer.collect_now()), media_type="application/json")
    await context.queue.attend([answer.id])
    writer = response_writer(answer, event_ids=False, seen=starting_after)
    if starting_after is not None:
        await _go_to(answer, writer, number=starting_after)
    return EventStream(answer, writer)


@router.post(
    "/v1/responses/{response_id}/cancel",
    response_model=None,
    responses=described(ResponseObject),
    summary="Cancel a response",
    description="Ends a response that has not ended, and gives it as it is then.",
)
async def cancel_response(
    response_id: ResponseId, request: Request, context: Context, tenant: Caller
) -> Response:
    """Find it, stop it, tell its state."""
    answer = await _find(response_id, request, context, tenant)
    await context.queue.stop(answer.request_ids, FinishReason.CANCELLED)
    return Response(body_of(answer, await answer.collect_now()), media_type="application/json")


@router.delete(
    "/v1/responses/{response_id}",
    response_model=None,
    responses=described(ResponseDeleted),
    summary="Delete a response",
    description="Ends a response and forgets it.",
)
async def delete_response(
    response_id: ResponseId, request: Request, context: Context, tenant: Caller
) -> Response:
    """Find it, forget it."""
    answer = await _find(response_id, request, context, tenant)
    await context.queue.forget(answer.id)
    body = orjson.dumps({"id": response_id, "object": "response", "deleted": True})
    return Response(body, media_type="application/json")


async def _find(
    response_id: str, request: Request, context: ApiContext, tenant: Tenant
) -> AnswerReader:
    call_id, manifest = await find_response(response_id, context, tenant)
    request.state.request_id = call_id
    return AnswerReader(
        call_id,
        manifest,
        context,
        tenant=tenant.name,
        arrived=request.state.arrived,
        resumed=True,
    )


async def _go_to(answer: AnswerReader, writer: ResponseRenderer, *, number: int) -> None:
    """Reads up to the event of that number. Raises BadRequest, StreamDivergence or Unavailable."""
    numbers = numbering(answer.manifest)
    count = numbers.tokens_at(number)
    reached = await read_to(answer, writer, choice=0, count=count)
    # The events after the last token have numbers, too.
    if reached < count and number > numbers.last(reached):
        raise BadRequest("starting_after must be the number of an event", param="starting_after")
