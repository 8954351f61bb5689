"""GET and DELETE /v1/streams/{id}: read an answer again, resume it at any replica, or cancel it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response

from service.api.answers import StreamCancelled, described, json_response
from service.api.auth import Tenant
from service.api.call import call_age
from service.api.context import ApiContext, Caller, Context
from service.api.generation.dialect import Dialect
from service.api.generation.manifest import Endpoint, Manifest
from service.api.generation.reader import AnswerReader
from service.api.generation.resume import read_to_event, resumed_reader
from service.api.generation.sse import EventStream
from service.errors import BadRequest, Gone, NotFound
from service.messages import FinishReason, child_ids
from service.queues.contract import StoredSubmission

CallId = Annotated[str, Path(description="The x-request-id of the call to read.")]
After = Annotated[
    str | None,
    Query(description="The id of the last event received; Last-Event-ID takes precedence."),
]
LastEventId = Annotated[
    str | None,
    Header(description="The id of the last event received. Default: from the start."),
]


def stream_routes(dialects: Mapping[Endpoint, Dialect[Any]]) -> APIRouter:
    """The routes. Each stream is rendered in the dialect that it was requested in."""
    router = APIRouter()

    @router.get("/v1/streams/{call_id}", responses=described(None, stream=True))
    async def resume_stream(
        call_id: CallId,
        request: Request,
        context: Context,
        tenant: Caller,
        *,
        after: After = None,
        last_event_id: LastEventId = None,
    ) -> Response:
        """Returns the events of a call, during its generation and for a while after it, from the
        start or after a given event. They have ids.
        """
        reader = await _reader(call_id, request, context, tenant)
        renderer = dialects[reader.manifest.endpoint].stream(reader, event_ids=True)
        if event_id := last_event_id or after:
            await read_to_event(reader, renderer, event_id)
        return EventStream(reader, renderer)

    @router.delete("/v1/streams/{call_id}", responses=described(StreamCancelled))
    async def cancel_stream(call_id: CallId, context: Context, tenant: Caller) -> Response:
        """Ends the unfinished choices of a call, with the finish reason `cancelled`."""
        stored = await _find(call_id, context, tenant)
        await context.queue.stop(child_ids(stored.id, stored.num_requests), FinishReason.CANCELLED)
        return json_response({"id": stored.id, "object": "stream", "cancelled": True})

    return router


async def _reader(
    call_id: str, request: Request, context: ApiContext, tenant: Tenant
) -> AnswerReader:
    stored = await _find(call_id, context, tenant)
    manifest = Manifest.from_json(stored.manifest)
    if manifest.width > manifest.keep:
        raise BadRequest("best_of cannot be streamed", code="unsupported_parameter")
    if not manifest.stored:
        raise NotFound("there is no such stream", code="stream_not_found")
    await context.queue.heartbeat([stored.id])
    return resumed_reader(stored.id, manifest, request, context, tenant)


async def _find(call_id: str, context: ApiContext, tenant: Tenant) -> StoredSubmission:
    """Raises NotFound, with one text for unknown, malformed and other tenants' ids, or Gone."""
    age = call_age(call_id)
    stored = None if age is None else await context.queue.lookup(call_id)
    if stored is not None and stored.tenant == tenant.name:
        return stored
    if age is not None and age > context.limits.resume_window:
        raise Gone("this stream is no longer kept, or never existed", retryable=False)
    raise NotFound("there is no such stream", code="stream_not_found")
