"""Who calls: from the raw ASGI scope to a tenant, before any route is looked at.

An `Authenticator` decides by the headers and by `scope["path"]`, the path as it will be routed;
never by a URL rebuilt from the Host header. It raises `Unauthorized` where there is no valid key.

With keys, everything needs one but the paths listed here, whether or not there is such a route: a
route that is added is closed until it is listed, and nobody learns without a key what exists.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.types import Scope

from service.errors import Unauthorized
from service.keys import Key
from service.messages import Allowance
from service.queues.admission import Usage

OPEN_PATHS = frozenset(
    {"/", "/health", "/health/live", "/health/ready", "/health/startup"},
)
"""The page and the probes: they tell nobody's words."""
OPEN_FILES = re.compile(r"/web/[a-z]+\.[a-z]+")
"""The page's parts, which anybody can read in the repository."""

UNCOUNTED_PATHS = frozenset({"/status"})
"""Not counted against a key's requests a minute: the page asks each second, and one reading serves
all who ask.
"""

_SECRET = re.compile(rb"[!-~]{1,255}")
_BEARER = re.compile(rb"(?i:bearer) +([!-~]{1,255}) *")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Whose request it is: limits, prefix cache and streams are kept apart by `name`."""

    name: str
    allowance: Allowance | None = None  # of the key
    highest_priority: int = 0  # that may be asked for


Authenticator = Callable[[Scope], Tenant]
Charge = Callable[[Allowance], Awaitable[Usage]]
"""`Queue.charge`."""

PUBLIC = Tenant(name="public")


def open_to_all(_scope: Scope) -> Tenant:
    """No keys: everybody is one tenant."""
    return PUBLIC


def only_with_key(find: Callable[[str], Key | None]) -> Authenticator:
    """`find` has the key to a secret. Open paths are PUBLIC's, with or without a key."""

    def authenticate(scope: Scope) -> Tenant:
        path = scope["path"]
        if path in OPEN_PATHS or OPEN_FILES.fullmatch(path):
            return PUBLIC
        key = find(_secret(scope))
        if key is None:
            raise Unauthorized("this key is not valid here")
        return Tenant(
            name=key.tenant or key.name,
            allowance=Allowance(
                key=key.name,
                requests_per_minute=key.requests_per_minute,
                tokens_per_minute=key.tokens_per_minute,
                max_in_flight=key.max_in_flight,
            ),
            highest_priority=key.highest_priority,
        )

    return authenticate


def is_counted(path: str) -> bool:
    """Whether calls to a path count against a key's requests a minute."""
    return path not in UNCOUNTED_PATHS


def never_refused(scope: Scope) -> bool:
    """Whether a call is let in when the key's minute is used up: it ends work, and costs as little
    as its refusal.
    """
    path: str = scope["path"]
    return scope["method"] == "DELETE" or path.endswith("/cancel")


def _secret(scope: Scope) -> str:
    """The one secret that a request shows, as OpenAI's clients send it or as Anthropic's do."""
    shown = [
        (name, value)
        for name, value in scope["headers"]
        if name in {b"authorization", b"x-api-key"}
    ]
    if len(shown) != 1:
        raise Unauthorized("one key is needed: Authorization: Bearer <key>, or x-api-key: <key>")
    name, value = shown[0]
    found = _BEARER.fullmatch(value) if name == b"authorization" else _SECRET.fullmatch(value)
    if found is None:
        raise Unauthorized("the key is malformed")
    return (found[1] if found.re is _BEARER else found[0]).decode()
