"""Request-context middleware: pure ASGI, around all routes; and the checks before it.

It gives each request an id, a tenant and an arrival time, and adds the id and the rate limits of
the key to every response. Ids that clients send are ignored. A HEAD request is served as the GET of
its path; the server omits the body.

Hosts: a page of any site can make a browser send requests to a server on the loopback interface,
and by DNS rebinding read the answers: its own name then resolves to 127.0.0.1. Such requests have
that name as their Host and that site as their Origin. A port that requires keys is not at risk: the
page has none. A Host that is an IP address cannot come from rebinding, which needs a name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from time import monotonic

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.http.auth import (
    Authenticator,
    Charge,
    Tenant,
    is_counted,
    never_rejected,
    over_rate,
    rate_headers,
)
from service.api.http.call import HEAD_ONLY, LINE, new_call_id
from service.api.http.errors import ErrorFormats, error_response
from service.api.http.observer import ApiObserver, HttpCall
from service.errors import Forbidden, QuireError, ShuttingDown, Unauthorized, Unavailable

HostCheck = Callable[[Scope], None]
"""Raises Forbidden for a request that must not be served."""

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)(?::[0-9]*)?")


def any_host(_scope: Scope) -> None:
    """No check: the port requires keys, or its names are unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedHosts:
    """Accepts loopback names and addresses, and what is listed.

    `names` are host names in lower case, without ports. `any_address` also accepts every IP
    address. `origins` are those whose pages may call other hosts; `*` allows all.
    """

    names: Collection[str] = ()
    any_address: bool = False
    origins: Collection[str] = ()

    def __call__(self, scope: Scope) -> None:
        """Raises Forbidden. A request without a Host is not from a browser."""
        host = _header(scope, b"host").lower()
        if host and not self._accepts_host(host):
            raise Forbidden(
                "the Host header must be a loopback name or address, or a name of --allowed-hosts",
                code="host_not_allowed",
            )
        origin = _header(scope, b"origin").lower()
        if origin and not self._accepts_origin(origin, host):
            raise Forbidden(
                "the Origin header must be this server's own, or an origin of --cors-origins",
                code="origin_not_allowed",
            )

    def _accepts_host(self, host: str) -> bool:
        name = _name(host)
        if name in self.names or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return address.is_loopback or (self.any_address and not address.is_unspecified)

    def _accepts_origin(self, origin: str, host: str) -> bool:
        if "*" in self.origins or origin in self.origins:
            return True
        netloc = origin.partition("://")[2]
        return bool(netloc) and (netloc == host or _name(netloc) in self.names)


def _header(scope: Scope, name: bytes) -> str:
    """A header; empty if it is absent or empty, joined if it came twice."""
    values = [value for key, value in scope["headers"] if key == name]
    return b",".join(values).strip().decode("latin-1")


def _name(host: str) -> str:
    """The host without its port and without the dot of a full name; empty if it is malformed."""
    found = _HOST.fullmatch(host)
    return "" if found is None else found[1].removesuffix(".")


EXPOSED = (
    "x-request-id", "request-id", "x-quire-warning",
    "retry-after", "retry-after-ms", "x-should-retry",
    *(
        f"x-ratelimit-{word}-{unit}"
        for word in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
)  # fmt: skip


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Lets web pages of other origins call the API. Must be called last: a preflight request has no
    key.

    No cookies are involved: a page sends its key in a header, as any client does. The headers that
    it needs to resume a stream and to respect its rate limit are exposed to it.
    """
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
    )


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
        key = _header(scope, b"idempotency-key") or None
        state["request_id"] = new_call_id(idempotency_key=key)
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
            if LINE not in state:  # a client's call
                self._check_host(scope)
                state["tenant"] = self._authenticate(scope)
        except (Forbidden, Unauthorized) as error:
            await error_response(error, error_format)(scope, receive, send_with_id)
            return
        state["trace"] = self._observer.call_began(_traceparent(scope))
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
        if (
            LINE in scope["state"]
            or self._charge is None
            or allowance is None
            or allowance.requests_per_minute is None
        ):
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


def _traceparent(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"traceparent":
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
