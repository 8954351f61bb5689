"""POST /v1/responses, and the endpoints of a response by its id.

A response is stored like any other answer, and its id is `resp_<call id>`: its state is a function
of the journal, so any replica can return it, resume its stream, cancel it or delete it.

A response keeps its own input items; those before them are its parent's, whose id it names
(`previous_response_id`). Each use of a chain starts the time for which all of its responses are
kept again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import TypeAdapter

from service.api.generation.manifest import Endpoint, Manifest
from service.api.generation.reader import AnswerReader
from service.api.generation.streams import EventStream, read_to, resumed_reader
from service.api.generation.submit import answer_generation
from service.api.http.auth import Tenant
from service.api.http.body import JsonRoute
from service.api.http.call import call_age
from service.api.http.context import ApiContext, Caller, Context, JsonRequest
from service.api.http.models import described, json_response
from service.api.responses.dialect import RESPONSES
from service.api.responses.items import AnyItem, InputItem, InputReference, stored_item
from service.api.responses.object import PREFIX, Status, output_items, status_of
from service.api.responses.schema import (
    ResponseBody,
    ResponseDeleted,
    ResponseInputItems,
    ResponseObject,
)
from service.api.responses.stream import ResponseRenderer, numbering
from service.errors import BadRequest, Conflict, NotFound
from service.messages import FinishReason

_ITEM_ID = re.compile(r"[a-z]{2,4}_(s[0-9]{1,4}-[0-9a-f]{32})(_(in)?[0-9]{1,4})?")
_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[AnyItem])


@dataclass(frozen=True, slots=True)
class Conversation:
    """The items of a new response: `items` are all of them, `own` those that are stored with it."""

    items: Sequence[InputItem]
    own: Sequence[InputItem]

    def stored_input(self, call_id: str) -> str:
        """Its own items as JSON, each with an id."""
        items = [stored_item(item, f"{call_id}_in{i}") for i, item in enumerate(self.own)]
        return orjson.dumps(items).decode()


async def find_response(
    response_id: str, context: ApiContext, tenant: Tenant
) -> tuple[str, Manifest]:
    """The call and the manifest of a stored response. Raises NotFound, with the same text for ids
    that are unknown, malformed, another tenant's, or of an answer that is no stored response.
    """
    call_id = response_id.removeprefix(PREFIX)
    valid = call_id != response_id and call_age(call_id) is not None
    stored = await context.queue.lookup(call_id) if valid else None
    if stored is not None and stored.tenant == tenant.name:
        manifest = Manifest.from_json(stored.manifest)
        if manifest.endpoint is Endpoint.RESPONSES and manifest.stored:
            return call_id, manifest
    raise NotFound("there is no such response", code="response_not_found")


async def input_items(call_id: str, context: ApiContext) -> list[dict[str, Any]]:
    """The input items of a stored response. Raises NotFound if they are no longer kept."""
    text = await context.queue.read_input(call_id)
    if text is None:
        raise NotFound("the input of this response is not kept", code="response_not_found")
    items: list[dict[str, Any]] = orjson.loads(text)
    return items


async def conversation(body: ResponseBody, context: ApiContext, tenant: Tenant) -> Conversation:
    """The items of the responses before, and of the body. Raises NotFound, Conflict, BadRequest or
    Unavailable.
    """
    history = _History(context, tenant)
    before: list[InputItem] = []
    if body.previous_response_id is not None:
        before = await history.chain(body.previous_response_id)
    own = [
        await history.item(item, index) if isinstance(item, InputReference) else item
        for index, item in enumerate(body.input)
    ]
    if history.used:
        await context.queue.touch(history.used)
    return Conversation([*before, *own], own)


class _History:
    """Reads stored responses for one call: no more of them, and no more bytes, than its limits."""

    def __init__(self, context: ApiContext, tenant: Tenant) -> None:
        self._context = context
        self._tenant = tenant
        self._items: dict[str, list[dict[str, Any]]] = {}  # call id -> input and output
        self._sizes: dict[str, int] = {}  # bytes of them as JSON

    @property
    def used(self) -> list[str]:
        """The calls of all responses that were read."""
        return list(self._items)

    async def chain(self, response_id: str) -> list[InputItem]:
        """All items up to the end of a response, oldest first."""
        links: list[list[InputItem]] = []
        following: str | None = response_id
        while following is not None:
            missing = _missing("previous_response", param="previous_response_id")
            call_id, following = await self._read(following, missing)
            links.append(await self._parsed(self._items[call_id], size=self._sizes[call_id]))
        return [item for link in reversed(links) for item in link]

    async def item(self, reference: InputReference, index: int) -> InputItem:
        """The item that a reference names."""
        missing = _missing("item", param=f"input[{index}].id")
        match = _ITEM_ID.fullmatch(reference.id)
        if match is None:
            raise missing
        if match[1] not in self._items:
            await self._read(PREFIX + match[1], missing)
        for item in self._items[match[1]]:
            if item["id"] == reference.id:
                (found,) = await self._parsed([item], size=len(orjson.dumps(item)))
                return found
        raise missing

    async def _read(self, response_id: str, missing: NotFound) -> tuple[str, str | None]:
        """Reads a response; returns its call and its parent."""
        context, param = self._context, missing.param
        if len(self._items) >= context.limits.max_chain:
            raise _too_long(f"{context.limits.max_chain} responses", param=param)
        try:
            call_id, manifest = await find_response(response_id, context, self._tenant)
            items = await input_items(call_id, context)
            reader = AnswerReader(
                call_id, manifest, context, tenant=self._tenant.name, arrived=0.0, resumed=True
            )
            (answer,) = await reader.collect_now()
        except NotFound:
            raise missing from None
        status = status_of(answer)
        if status in {Status.QUEUED, Status.IN_PROGRESS}:
            message = "a response that the input refers to has not ended"
            raise Conflict(message, code="response_in_progress", param=param)
        items += output_items(reader, answer, status)
        self._items[call_id], self._sizes[call_id] = items, len(orjson.dumps(items))
        if sum(self._sizes.values()) > context.limits.max_body_bytes:
            raise _too_long(f"responses of {context.limits.max_body_bytes} bytes", param=param)
        return call_id, manifest.given_back.get("previous_response_id")

    async def _parsed(self, items: Sequence[dict[str, Any]], *, size: int) -> list[InputItem]:
        if size <= self._context.limits.inline_body_bytes:
            return _ITEMS.validate_python(items)
        parse = partial(_ITEMS.validate_python, items)
        return await self._context.pools.bodies.run(self._tenant.name, parse, weight=size)


def _missing(what: str, *, param: str) -> NotFound:
    message = f"this {what.replace('_', ' ')} is not kept, or never existed"
    return NotFound(message, code=f"{what}_not_found", param=param)


def _too_long(most: str, *, param: str | None) -> BadRequest:
    message = f"an input may refer to at most {most}; send the items that are needed instead"
    return BadRequest(message, code="chain_too_long", param=param)


router = APIRouter(route_class=JsonRoute)

MAX_NUMBER = 10**9

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
    return await answer_generation(RESPONSES, generation, request, context, tenant)


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
    call_id, _ = await find_response(response_id, context, tenant)
    request.state.request_id = call_id
    await context.queue.forget(call_id)
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
