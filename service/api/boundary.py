"""Boundary: the pure ASGI shell around the routes. It gives each request its id, its tenant and the
time of its arrival, and puts the id on every answer. Ids that clients send are not used.
"""

from __future__ import annotations

from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import Authenticator
from service.api.ids import new_call_id
from service.api.observer import ApiObserver
from service.api.refusals import error_response
from service.errors import Unauthorized

_ID_HEADER = b"x-request-id"


class Boundary:
    """ASGI middleware: `scope["state"]` gets `request_id`, `tenant` and `arrived`."""

    def __init__(self, app: ASGIApp, *, authenticate: Authenticator, observer: ApiObserver) -> None:
        self._app = app
        self._authenticate = authenticate
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one scope; others than HTTP pass as they are."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = new_call_id()
        state["arrived"] = monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._observer.call_answered(message["status"])
                identity = (_ID_HEADER, state["request_id"].encode())
                message = {**message, "headers": [*message["headers"], identity]}
            await send(message)

        try:
            state["tenant"] = self._authenticate(scope)
        except Unauthorized as error:
            await error_response(error)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)
