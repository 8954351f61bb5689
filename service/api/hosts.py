"""Host and Origin headers: which of them a port without keys accepts; and CORS.

A page of any site can make a browser send requests to a server on the loopback interface, and by
DNS rebinding read the answers: its own name then resolves to 127.0.0.1. Such requests have that
name as their Host and that site as their Origin. A port that requires keys is not at risk: the page
has none. A Host that is an IP address cannot come from rebinding, which needs a name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from service.errors import Forbidden

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
        host = _header(scope, b"host")
        if host and not self._accepts_host(host):
            raise Forbidden(
                "the Host header must be a loopback name or address, or a name of --allowed-hosts",
                code="host_not_allowed",
            )
        origin = _header(scope, b"origin")
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
    """A header in lower case; empty if it is absent or empty, joined if it came twice."""
    values = [value for key, value in scope["headers"] if key == name]
    return b",".join(values).strip().decode("latin-1").lower()


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
