"""Descriptors: how many connections a process may have, of the files that it may open.

limit (RLIMIT_NOFILE) = connections of the API + reserve
reserve = connections of the admin port + connections that are being refused or accepted
        + Redis, files and devices
"""

from __future__ import annotations

import contextlib
import resource
from dataclasses import dataclass

from service.errors import StartupError
from service.http.connections import ConnectionLimits, ConnectionObserver, Connections
from service.settings import Settings

MOST_CONNECTIONS = 8192  # by default, however many files may be open: each costs memory, too
RESERVE = 256  # descriptors for all but the API's connections; half of the limit if that is less
ADMIN = 64  # connections of the admin port, of the reserve
REFUSED = 32  # connections that are being refused, of the reserve, at each port
UNLIMITED = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionPlan:
    """The limits of both ports."""

    api: ConnectionLimits
    admin: ConnectionLimits


def raise_descriptor_limit() -> int:
    """Raises the soft limit to the hard limit if that is allowed; returns the limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def plan_connections(settings: Settings, *, descriptors: int) -> ConnectionPlan:
    """Divides the descriptors among the ports. Raises StartupError if a setting needs more."""
    reserve = min(RESERVE, descriptors // 2)
    most = descriptors - reserve
    total = settings.max_connections or min(MOST_CONNECTIONS, most)
    if total > most:
        raise StartupError(
            f"setting max_connections: must be at most {most}: the process may open {descriptors}"
            " files (ulimit -n)"
        )
    # One address cannot take all places: a quarter stays free for others.
    per_address = settings.max_connections_per_address or max(1, total * 3 // 4)
    refused = max(1, REFUSED * reserve // RESERVE)
    admin = max(1, ADMIN * reserve // RESERVE)
    return ConnectionPlan(
        api=ConnectionLimits(total=total, per_address=per_address, refused=refused),
        admin=ConnectionLimits(total=admin, per_address=admin, refused=refused),
    )


@dataclass(frozen=True, slots=True)
class Places:
    """The connections that each port may have."""

    api: Connections
    admin: Connections


def open_places(settings: Settings, *, observer: ConnectionObserver) -> Places:
    """Raises the limit of open files and divides them. Raises StartupError if they are too few."""
    plan = plan_connections(settings, descriptors=raise_descriptor_limit())
    return Places(
        api=Connections(plan.api, port="api", observer=observer),
        admin=Connections(plan.admin, port="admin", observer=observer),
    )
