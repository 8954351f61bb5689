"""Call: what is known of one HTTP call besides its body: its id, who calls, steering headers."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from service.api.auth import Tenant
from service.api.context import JsonRequest
from service.api.limits import ApiLimits
from service.errors import BadRequest

_DIGITS = re.compile(r"[0-9]{1,12}")
_PRINTABLE = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call. `arrived` is on the monotonic clock."""

    id: str
    tenant: Tenant
    arrived: float
    timeout_ms: int | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""  # of path and body, where there is a key to compare it by
    event_ids: bool = False  # the stream carries ids, and can be resumed by them
    trace: str | None = None  # its own `traceparent`; None: it is not traced


def read_call(request: JsonRequest, tenant: Tenant, limits: ApiLimits) -> Call:
    """Raises BadRequest with the name of a bad header as `param`."""
    key = _key(request.headers.get("idempotency-key"), limits)
    return Call(
        id=request.state.request_id,
        tenant=tenant,
        arrived=request.state.arrived,
        timeout_ms=_timeout(request.headers.get("x-request-timeout-ms"), limits),
        idempotency_key=key,
        fingerprint="" if key is None else _fingerprint(request, limits),
        event_ids=_flag(request.headers.get("x-quire-event-ids")),
        trace=request.state.trace,
    )


def _fingerprint(request: JsonRequest, limits: ApiLimits) -> str:
    """Of path and body. The order of keys and white space do not count, but in a long body they do:
    to write it again would hold up the event loop.
    """
    content = request.raw
    if len(content) <= limits.inline_body_bytes:
        canonical = json.dumps(request.parsed, sort_keys=True, separators=(",", ":"))
        content = canonical.encode()
    return hashlib.sha256(request.scope["path"].encode() + b"\n" + content).hexdigest()


def _timeout(value: str | None, limits: ApiLimits) -> int | None:
    if value is None:
        return None
    if not _DIGITS.fullmatch(value) or not 1 <= int(value) <= limits.max_timeout_ms:
        raise BadRequest(
            f"x-request-timeout-ms must be an integer from 1 to {limits.max_timeout_ms}",
            param="x-request-timeout-ms",
        )
    return int(value)


def _key(value: str | None, limits: ApiLimits) -> str | None:
    if value is None:
        return None
    if len(value) > limits.max_key_chars or not _PRINTABLE.fullmatch(value):
        raise BadRequest(
            f"Idempotency-Key must be 1 to {limits.max_key_chars} visible ASCII characters",
            param="idempotency-key",
        )
    return value


def _flag(value: str | None) -> bool:
    if value not in {None, "0", "1"}:
        raise BadRequest("X-Quire-Event-Ids must be 0 or 1", param="x-quire-event-ids")
    return value == "1"
