"""Request-context middleware: pure ASGI, around all routes.

It gives each request an id, a tenant and an arrival time, and adds the id and the rate limits of
the key to every response. Ids that clients send are ignored. A HEAD request is served as the GET of
its path; the server omits the body.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import (
    Authenticator,
    Charge,
    Tenant,
    is_counted,
    never_rejected,
    over_rate,
    rate_headers,
)
from service.api.call import HEAD_ONLY, new_call_id
from service.api.errors import ErrorFormats, error_response
from service.api.hosts import HostCheck, any_host
from service.api.observer import ApiObserver, HttpCall
from service.errors import Forbidden, QuireError, ShuttingDown, Unauthorized, Unavailable

_ID_HEADER = b"x-request-id"


class RequestContextMiddleware:
    """Sets `request_id`, `tenant`, `arrived`, `trace` and, for a key with limits, `usage` in
    `scope["state"]`. `charge` counts a call for its key.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        authenticate: Authenticator,
        observer: ApiObserver,
        error_formats: ErrorFormats,
        check_host: HostCheck = any_host,
        charge: Charge | None = None,
    ) -> None:
        self._app = app
        self._check_host = check_host
        self._authenticate = authenticate
        self._observer = observer
        self._error_formats = error_formats
        self._charge = charge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one scope. A WebSocket is closed: no route supports it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state, method = scope.setdefault("state", {}), scope["method"]
        if method == "HEAD":
            # A copy: the server reads its own scope to omit the body.
            state[HEAD_ONLY] = True
            scope = {**scope, "method": "GET"}
        state["request_id"] = new_call_id(idempotency_key=_header(scope, b"idempotency-key"))
        state["arrived"] = monotonic()
        status = 0
        error_format = self._error_formats(scope["path"])
        id_headers = [_ID_HEADER, *error_format.id_headers]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._observer.call_answered(status)
                identity = [(name, state["request_id"].encode()) for name in id_headers]
                rates = rate_headers(state.get("usage"))
                message = {**message, "headers": [*message["headers"], *identity, *rates]}
            await send(message)

        try:
            self._check_host(scope)
            state["tenant"] = self._authenticate(scope)
        except (Forbidden, Unauthorized) as error:
            await error_response(error, error_format)(scope, receive, send_with_id)
            return
        state["trace"] = self._observer.call_began(_header(scope, b"traceparent"))
        try:
            rejection = await self._count(scope, state["tenant"])
            app = self._app if rejection is None else error_response(rejection, error_format)
            await app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the process ends and cannot wait for this call
            if status:
                raise
            await error_response(ShuttingDown(), error_format)(scope, receive, send_with_id)
        finally:
            if state["trace"] is not None:
                self._observer.call_over(_traced(scope, method, status=status))

    async def _count(self, scope: Scope, tenant: Tenant) -> QuireError | None:
        """Counts a call, whatever its outcome. Returns the error if it is rejected."""
        allowance = tenant.allowance
        if self._charge is None or allowance is None or allowance.requests_per_minute is None:
            return None
        if not is_counted(scope["path"]):
            return None
        try:
            scope["state"]["usage"] = usage = await self._charge(allowance)
        except Unavailable as error:
            return error
        if not usage.wait or never_rejected(scope):
            return None
        self._observer.call_refused("rate")
        return over_rate(usage)


def _header(scope: Scope, wanted: bytes) -> str | None:
    for name, value in scope["headers"]:
        if name == wanted:
            return str(value, "latin-1")
    return None


def _traced(scope: Scope, method: str, *, status: int) -> HttpCall:
    state, route = scope["state"], scope.get("route")
    return HttpCall(
        trace=state["trace"],
        id=state["request_id"],
        method=method,
        route=getattr(route, "path", None),
        status=status,
    )
