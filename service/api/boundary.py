"""Boundary: the pure ASGI shell around the routes. It gives each request its id, its tenant and the
time of its arrival, and puts the id, and where its key stands, on every answer. Ids that clients
send are not used.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import Authenticator
from service.api.ids import new_call_id
from service.api.message_errors import MESSAGE_ID, is_message_path
from service.api.observer import ApiObserver, HttpCall
from service.api.rates import rate_headers
from service.api.refusals import error_response
from service.errors import ShuttingDown, Unauthorized

_ID_HEADER = b"x-request-id"


class Boundary:
    """ASGI middleware: `scope["state"]` gets `request_id`, `tenant`, `arrived` and `trace`.

    A handler that used a key's minute up puts `usage` there.
    """

    def __init__(self, app: ASGIApp, *, authenticate: Authenticator, observer: ApiObserver) -> None:
        self._app = app
        self._authenticate = authenticate
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one scope. A WebSocket, which no route speaks, goes no further."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = new_call_id()
        state["arrived"] = monotonic()
        caller = _traceparent(scope)
        state["trace"] = self._observer.call_began(caller)
        status = 0
        path = scope["path"]
        id_headers = [_ID_HEADER, MESSAGE_ID] if is_message_path(path) else [_ID_HEADER]

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
            state["tenant"] = self._authenticate(scope)
        except Unauthorized as error:
            await error_response(error, path=path)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the process ends, and cannot wait for this call
            if status:
                raise
            await error_response(ShuttingDown(), path=path)(scope, receive, send_with_id)
        finally:
            if state["trace"] is not None:
                self._observer.call_over(_traced(scope, caller=caller, status=status))


def _traceparent(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"traceparent":
            return str(value, "latin-1")
    return None


def _traced(scope: Scope, *, caller: str | None, status: int) -> HttpCall:
    state, route = scope["state"], scope.get("route")
    return HttpCall(
        trace=state["trace"],
        parent=caller,
        id=state["request_id"],
        method=scope["method"],
        route=getattr(route, "path", None),
        status=status,
        duration=monotonic() - state["arrived"],
    )
