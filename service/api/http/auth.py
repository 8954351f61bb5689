"""Authentication: from the raw ASGI scope to a tenant, before routing; and the key's rate limits.

An `Authenticator` decides by the headers and by `scope["path"]`, the path that is routed; never by
a URL built from the Host header. It raises `Unauthorized` if there is no valid key.

If keys are required, every path needs one but those listed here, whether or not the route exists: a
new route is closed until it is listed, and clients without a key cannot find out what exists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from starlette.types import Scope

from service.errors import RateLimited, Unauthorized
from service.keys import Key
from service.messages import Allowance
from service.queues.admission import Meter, RateUsage

OPEN_PATHS = frozenset(
    {"/", "/health", "/health/live", "/health/ready", "/health/startup"},
)
"""The page and the probes: they return nothing about requests."""
OPEN_FILES = re.compile(r"/web/[a-z]+\.[a-z]+")
"""The page's files, which are public in the repository."""

UNCOUNTED_PATHS = frozenset({"/status"})
"""Not counted against a key's requests per minute: the page polls it each second, and one reading
serves all clients.
"""

_SECRET = re.compile(rb"[!-~]{1,255}")
_BEARER = re.compile(rb"(?i:bearer) +([!-~]{1,255}) *")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """The owner of a request: limits, prefix cache and streams are separate per `name`."""

    name: str
    allowance: Allowance | None = None  # of the key
    highest_priority: int = 0  # that may be requested


Authenticator = Callable[[Scope], Tenant]
Charge = Callable[[Allowance], Awaitable[RateUsage]]
"""`Queue.charge`."""

PUBLIC = Tenant(name="public")


def open_to_all(_scope: Scope) -> Tenant:
    """No keys: all clients are one tenant."""
    return PUBLIC


def only_with_key(find: Callable[[str], Key | None]) -> Authenticator:
    """`find` returns the key of a secret. On open paths the tenant is PUBLIC, even with a key."""

    def authenticate(scope: Scope) -> Tenant:
        path = scope["path"]
        if path in OPEN_PATHS or OPEN_FILES.fullmatch(path):
            return PUBLIC
        key = find(_secret(scope))
        if key is None:
            raise Unauthorized("invalid API key")
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
    """Whether calls to a path count against a key's requests per minute."""
    return path not in UNCOUNTED_PATHS


def never_rejected(scope: Scope) -> bool:
    """Whether a call is accepted over the rate limit: it ends work, and costs no more than its
    rejection.
    """
    path: str = scope["path"]
    return scope["method"] == "DELETE" or path.endswith("/cancel")


def _secret(scope: Scope) -> str:
    """The one secret in the headers, as OpenAI's or as Anthropic's clients send it."""
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


# --- rate limits ----------------------------------------------------------------------------


def rate_headers(usage: RateUsage | None) -> list[tuple[bytes, bytes]]:
    """Limit, remainder and time until the reset of each limit of the key, as OpenAI names them."""
    if usage is None:
        return []
    return [*_of_meter("requests", usage.requests), *_of_meter("tokens", usage.tokens)]


def over_rate(usage: RateUsage) -> RateLimited:
    """The error of a call or a submission over the rate limit."""
    limits = [
        f"{meter.limit} {unit} per minute"
        for unit, meter in (("requests", usage.requests), ("tokens", usage.tokens))
        if meter is not None
    ]
    return RateLimited(f"this key has {' and '.join(limits)}", retry_after=usage.wait)


def with_tokens(charged: RateUsage | None, submitted: RateUsage) -> RateUsage:
    """The usage of a key after a submission: requests are counted before it, tokens by it."""
    return submitted if charged is None else replace(charged, tokens=submitted.tokens)


def _of_meter(unit: str, meter: Meter | None) -> list[tuple[bytes, bytes]]:
    if meter is None:
        return []
    values = {"limit": meter.limit, "remaining": meter.remaining, "reset": _span(meter.reset)}
    return [
        (f"x-ratelimit-{name}-{unit}".encode(), str(value).encode())
        for name, value in values.items()
    ]


def _span(seconds: float) -> str:
    """In OpenAI's notation: `820ms`, `7.25s`, `2m4.5s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
