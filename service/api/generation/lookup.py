"""Lookup: from an id that a client gives to a stored call of its own."""

from __future__ import annotations

from service.api.auth import Tenant
from service.api.context import ApiContext
from service.api.generation.manifest import Endpoint, Manifest
from service.api.ids import call_age
from service.api.responses.object import PREFIX
from service.errors import Gone, NotFound
from service.queues.contract import StoredSubmission


async def find_call(call_id: str, context: ApiContext, tenant: Tenant) -> StoredSubmission:
    """Raises NotFound, with one text for unknown, malformed and other tenants' ids, or Gone."""
    age = call_age(call_id)
    stored = None if age is None else await context.queue.lookup(call_id)
    if stored is not None and stored.tenant == tenant.name:
        return stored
    if age is not None and age > context.limits.resume_window:
        raise Gone("this stream is no longer kept, or never was", retryable=False)
    raise NotFound("there is no such stream", code="stream_not_found")


async def find_response(
    response_id: str, context: ApiContext, tenant: Tenant
) -> tuple[str, Manifest]:
    """The call id and manifest of a stored response. Raises NotFound, with one text for all."""
    call_id = response_id.removeprefix(PREFIX)
    known = call_id != response_id and call_age(call_id) is not None
    stored = await context.queue.lookup(call_id) if known else None
    if stored is not None and stored.tenant == tenant.name:
        manifest = Manifest.from_json(stored.manifest)
        if manifest.endpoint is Endpoint.RESPONSES and manifest.stored:
            return call_id, manifest
    raise NotFound("there is no such response", code="response_not_found")
