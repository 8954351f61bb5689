"""POST /v1/responses, and the endpoints of a response by its id.

A response is stored like any other answer, and its id is `resp_<call id>`: its state is a function
of the journal, so any replica can return it, resume its stream, cancel it or delete it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response

from service.api.answers import described, json_response
from service.api.auth import Tenant
from service.api.body import JsonRoute
from service.api.context import ApiContext, Caller, Context, JsonRequest
from service.api.generation.reader import AnswerReader
from service.api.generation.resume import read_to, resumed_reader
from service.api.generation.sse import EventStream
from service.api.generation.submit import answer_generation
from service.api.responses.dialect import RESPONSES
from service.api.responses.history import conversation, find_response, input_items
from service.api.responses.schema import (
    ResponseBody,
    ResponseDeleted,
    ResponseInputItems,
    ResponseObject,
)
from service.api.responses.stream import ResponseRenderer, numbering
from service.errors import BadRequest, NotFound
from service.messages import FinishReason

router = APIRouter(route_class=JsonRoute)

MAX_NUMBER = 10**9
WARNING = "x-quire-warning"
"""Header of an answer for which a part of the request was dropped."""

ResponseId = Annotated[str, Path(description="The id of a response.")]


@router.post("/v1/responses", responses=described(ResponseObject, stream=True))
async def create_response(
    body: ResponseBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Answers a text or messages. With `background` it returns at once, and generates without a
    reader. With `stream` it returns server-sent events, each with the number that the stream can be
    resumed after.
    """
    found = await conversation(body, context, tenant)
    call_id = request.state.request_id
    stored = None if body.store is False else found.stored_input(call_id)
    generation = RESPONSES.generation(body, found.items, stored_input=stored)
    response = await answer_generation(RESPONSES, generation, request, context, tenant)
    if body.dropped_tools:
        dropped = ", ".join(body.dropped_tools)
        response.headers[WARNING] = f"tools that this server lacks were dropped: {dropped}"
    return response


@router.post("/v1/responses/compact", include_in_schema=False)
async def compact_response() -> Response:
    """Refuses: otherwise the method would be what is wrong with this URL."""
    raise NotFound("this server does not compact responses", code="unknown_url")


@router.get("/v1/responses/{response_id}", responses=described(ResponseObject, stream=True))
async def retrieve_response(
    response_id: ResponseId,
    request: Request,
    context: Context,
    tenant: Caller,
    *,
    stream: Annotated[bool, Query(description="Events instead of the response.")] = False,
    starting_after: Annotated[
        int | None,
        Query(ge=0, le=MAX_NUMBER, description="The `sequence_number` of the last event received."),
    ] = None,
) -> Response:
    """Returns a stored response in its current state; or with `stream` its events, all of them or
    those after a number.
    """
    reader = await _find(response_id, request, context, tenant)
    if not stream:
        if starting_after is not None:
            raise BadRequest("starting_after needs stream to be true", param="starting_after")
        return await _current(reader)
    await context.queue.heartbeat([reader.id])
    renderer = ResponseRenderer(reader, event_ids=False, seen=starting_after)
    if starting_after is not None:
        await _read_to(reader, renderer, number=starting_after)
    return EventStream(reader, renderer)


@router.get("/v1/responses/{response_id}/input_items", responses=described(ResponseInputItems))
async def list_input_items(
    response_id: ResponseId,
    context: Context,
    tenant: Caller,
    *,
    after: Annotated[str | None, Query(description="List the items after this one.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="The maximum number of items.")] = 20,
    order: Annotated[
        Literal["asc", "desc"], Query(description="desc: the last item first.")
    ] = "desc",
) -> Response:
    """Lists the input items of a stored response, without those of the responses before it."""
    call_id, _ = await find_response(response_id, context, tenant)
    items = await input_items(call_id, context)
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise BadRequest("after must be the id of an input item of this response", param="after")
    first = 0 if after is None else ids.index(after) + 1
    page = items[first : first + limit]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": first + limit < len(items),
        }
    )


@router.post("/v1/responses/{response_id}/cancel", responses=described(ResponseObject))
async def cancel_response(
    response_id: ResponseId, request: Request, context: Context, tenant: Caller
) -> Response:
    """Ends a response that has not ended, and returns it."""
    reader = await _find(response_id, request, context, tenant)
    await context.queue.stop(reader.request_ids, FinishReason.CANCELLED)
    return await _current(reader)


@router.delete("/v1/responses/{response_id}", responses=described(ResponseDeleted))
async def delete_response(
    response_id: ResponseId, request: Request, context: Context, tenant: Caller
) -> Response:
    """Ends a response if it has not ended, and deletes it."""
    reader = await _find(response_id, request, context, tenant)
    await context.queue.forget(reader.id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def _find(
    response_id: str, request: Request, context: ApiContext, tenant: Tenant
) -> AnswerReader:
    """A reader of a stored response. Raises NotFound."""
    call_id, manifest = await find_response(response_id, context, tenant)
    return resumed_reader(call_id, manifest, request, context, tenant)


async def _current(reader: AnswerReader) -> Response:
    body = RESPONSES.collect(reader, await reader.collect_now())
    return Response(body, media_type="application/json")


async def _read_to(reader: AnswerReader, renderer: ResponseRenderer, *, number: int) -> None:
    """Reads up to the event of that number. Raises BadRequest, StreamDivergence or Unavailable."""
    numbers = numbering(reader.manifest)
    count = numbers.tokens_at(number)
    reached = await read_to(reader, renderer, choice=0, count=count)
    # The events after the last token have numbers, too.
    if reached < count and number > numbers.last(reached):
        raise BadRequest("starting_after must be the number of an event", param="starting_after")
