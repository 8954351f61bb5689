"""Descriptors: divides the files that the process may open among its ports.

RLIMIT_NOFILE = connections of the API port + reserve
reserve       = connections of the admin port + connections that are being refused or accepted
              + Redis, files and devices
"""

from __future__ import annotations

import contextlib
import resource
from dataclasses import dataclass

from service.errors import StartupError
from service.http.connections import ConnectionLimits, ConnectionObserver, Connections
from service.settings import Settings

DEFAULT_CONNECTIONS = 8192  # at most: each connection also takes memory
RESERVE = 256  # descriptors for all but the API's connections; at most half of the limit
ADMIN = 64  # connections of the admin port, out of the reserve
REFUSED = 32  # connections that are being refused, per port, out of the reserve
UNLIMITED = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionPlan:
    """The limits of both ports."""

    api: ConnectionLimits
    admin: ConnectionLimits


def raise_descriptor_limit() -> int:
    """Raises the soft limit to the hard limit if possible. Returns the limit now in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def plan_connections(settings: Settings, *, descriptors: int) -> ConnectionPlan:
    """Divides the descriptors among the ports. Raises StartupError if a setting exceeds them."""
    reserve = min(RESERVE, descriptors // 2)
    most = descriptors - reserve
    total = settings.max_connections or min(DEFAULT_CONNECTIONS, most)
    if total > most:
        raise StartupError(
            f"setting max_connections: must be at most {most}: the process may open {descriptors}"
            " files (ulimit -n)"
        )
    # A quarter of the slots stays free for other addresses.
    per_address = settings.max_connections_per_address or max(1, total * 3 // 4)
    refused = max(1, REFUSED * reserve // RESERVE)
    admin = max(1, ADMIN * reserve // RESERVE)
    return ConnectionPlan(
        api=ConnectionLimits(total=total, per_address=per_address, refused=refused),
        admin=ConnectionLimits(total=admin, per_address=admin, refused=refused),
    )


def make_connections(
    settings: Settings, *, observer: ConnectionObserver
) -> tuple[Connections, Connections]:
    """Raises the descriptor limit; returns the slots of the API port and of the admin port.

    Raises StartupError if the limit is too low for a setting.
    """
    plan = plan_connections(settings, descriptors=raise_descriptor_limit())
    return (
        Connections(plan.api, port="api", observer=observer),
        Connections(plan.admin, port="admin", observer=observer),
    )
