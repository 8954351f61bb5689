"""GET and DELETE /v1/streams/{id}: read an answer again or on, from any replica, or cancel it.

Event id: `<tokens so far>.<6 hex digits of their digest>`, and with several choices one such part
for each, in order, joined by commas. Replaying the journal up to that point puts the reader and
what it renders into the state they had: the bytes that follow are those that followed before.
"""

from __future__ import annotations

from typing import Annotated

import orjson
from fastapi import APIRouter, Header, Path, Query, Request, Response

from service.api.answers import StreamCancelled, described
from service.api.context import Caller, Context
from service.api.generation.lookup import find_call
from service.api.generation.manifest import Manifest
from service.api.generation.reader import AnswerReader
from service.api.generation.resume import read_to_event
from service.api.generation.sse import EventStream
from service.api.generation.writers import writer_of
from service.errors import BadRequest, NotFound
from service.messages import FinishReason, child_ids

router = APIRouter()

CallId = Annotated[str, Path(description="The x-request-id of the call to read.")]
After = Annotated[
    str | None,
    Query(description="The id of the last event that was seen; Last-Event-ID goes first."),
]
LastEventId = Annotated[
    str | None,
    Header(description="The id of the last event that was seen. Default: from the start."),
]


@router.get(
    "/v1/streams/{call_id}",
    response_model=None,
    responses=described(None, stream=True),
    summary="Resume a stream",
    description="The events of a call, during its generation and for a while after it, from the "
    "start or after a given event. They carry ids.",
)
async def read_stream(  # each is a part of the request
    call_id: CallId,
    request: Request,
    context: Context,
    tenant: Caller,
    *,
    after: After = None,
    last_event_id: LastEventId = None,
) -> Response:
    """Looks the call up, reads up to the position of the client, and streams the rest."""
    stored = await find_call(call_id, context, tenant)
    manifest = Manifest.from_json(stored.manifest)
    if manifest.width > manifest.keep:
        raise BadRequest("best_of cannot be streamed", code="unsupported_parameter")
    if not manifest.stored:
        raise NotFound("there is no such stream", code="stream_not_found")
    await context.queue.attend([stored.id])
    answer = AnswerReader(
        stored.id,
        manifest,
        context,
        tenant=tenant.name,
        arrived=request.state.arrived,
        resumed=True,
    )
    request.state.request_id = stored.id
    writer = writer_of(answer, event_ids=True)
    if event_id := last_event_id or after:
        await read_to_event(answer, writer, event_id)
    return EventStream(answer, writer)


@router.delete(
    "/v1/streams/{call_id}",
    response_model=None,
    responses=described(StreamCancelled),
    summary="Cancel a call",
    description="Ends what has not ended of a call, with the finish reason `cancelled`.",
)
async def cancel_stream(call_id: CallId, context: Context, tenant: Caller) -> Response:
    """Find it, stop it."""
    stored = await find_call(call_id, context, tenant)
    await context.queue.stop(child_ids(stored.id, stored.num_requests), FinishReason.CANCELLED)
    body = orjson.dumps({"id": stored.id, "object": "stream", "cancelled": True})
    return Response(body, media_type="application/json")
