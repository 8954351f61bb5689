"""Who calls: from the raw ASGI scope to a tenant, before any route is looked at.

An `Authenticator` decides by the headers and by `scope["path"]`, the path as it will be routed;
never by a URL rebuilt from the Host header. It raises `Unauthorized` where there is no valid key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Whose request it is: limits, prefix cache and streams are kept apart by `name`."""

    name: str


Authenticator = Callable[[Scope], Tenant]

PUBLIC = Tenant(name="public")


def open_to_all(_scope: Scope) -> Tenant:
    """No keys: everybody is one tenant."""
    return PUBLIC
