"""Connections: limits on the open connections of a port, in all and per client address.

    idle    waits for a request, or for the rest of one; may be closed to admit a new connection,
            the longest idle first
    busy    a response is being computed or sent; never closed for another connection

At a limit, an idle connection is closed: one of the same address if the address is at its limit,
any one if the port is. If none is idle, the new connection is refused, with an error response or,
if too many are being refused already, without.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from service.errors import QuireError, RateLimited, Unavailable

log = logging.getLogger("quire")

LOG_PAUSE = 60.0
"""A limit is logged again if it was not reached for this many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Maximum numbers of open connections of one port."""

    total: int = 8192
    per_address: int = 8192
    refused: int = 32  # those that get an error response, in addition to the total


class Outcome(StrEnum):
    """What reaching a limit led to: an idle connection was closed, or the new one refused."""

    CLOSED = "closed"
    REFUSED = "refused"


class ConnectionObserver:
    """Called in the event loop. It ignores all events; subclasses override the methods."""

    def connections_open(self, port: str, count: int) -> None:
        """The number of open connections of a port changed to `count`."""

    def connection_limited(self, port: str, outcome: Outcome) -> None:
        """A limit was reached."""


@dataclass(slots=True)
class _Group:
    """The connections of one address."""

    count: int = 0
    idle: OrderedDict[Slot, None] = field(default_factory=OrderedDict)


class Slot:
    """One connection's slot. If `refusal` is set, it is the connection's only response."""

    def __init__(self, pool: Connections, address: str, refusal: QuireError | None) -> None:
        self.address = address
        self.refusal = refusal
        self.abort: Callable[[], None] | None = None  # set when the connection is made
        self._pool: Connections | None = pool

    def idle(self) -> None:
        """Marks the connection as idle since now."""
        if self._pool is not None and self.refusal is None:
            self._pool.mark_idle(self)

    def busy(self) -> None:
        """Marks the connection as busy."""
        if self._pool is not None:
            self._pool.mark_busy(self)

    def release(self) -> None:
        """Frees the slot after the connection ended. Idempotent."""
        if self._pool is not None:
            self._pool.remove(self)
            self._pool = None


class Connections:
    """The slots of one port. `port` is its name in logs and metrics."""

    def __init__(
        self,
        limits: ConnectionLimits,
        *,
        port: str = "api",
        observer: ConnectionObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._port = port
        self._observer = observer or ConnectionObserver()
        self._clock = clock
        self._groups: dict[str, _Group] = {}
        self._idle: OrderedDict[Slot, None] = OrderedDict()
        self._count = 0
        self._num_refused = 0  # refused connections that are still open
        self._last_limited: dict[str, float] = {}  # kind of limit -> when it was last reached

    def __len__(self) -> int:
        return self._count

    def admit(self, host: str) -> Slot | None:
        """Returns a slot for a new connection; None if it must be closed at once."""
        address = address_group(host)
        group = self._groups.get(address, _Group())
        refusal: QuireError | None = None
        if group.count >= self._limits.per_address:
            refusal = self._make_room(
                group.idle,
                RateLimited(
                    f"one address may have at most {self._limits.per_address} connections",
                    code="too_many_connections",
                ),
                setting="max_connections_per_address",
            )
        elif self._count >= self._limits.total:
            refusal = self._make_room(
                self._idle,
                Unavailable("the server has too many connections", code="too_many_connections"),
                setting="max_connections",
            )
        if refusal is not None:
            if self._num_refused >= self._limits.refused:
                return None
            self._num_refused += 1
            return Slot(self, address, refusal)
        # Looked up again: closing its last connection may have removed the group.
        self._groups.setdefault(address, group).count += 1
        self._set_count(self._count + 1)
        return Slot(self, address, None)

    def _make_room(
        self, idle: OrderedDict[Slot, None], refusal: QuireError, *, setting: str
    ) -> QuireError | None:
        """Closes the longest idle connection; returns `refusal` if there is none."""
        outcome = Outcome.CLOSED if idle else Outcome.REFUSED
        self._observer.connection_limited(self._port, outcome)
        self._log(setting)
        if not idle:
            return refusal
        oldest = next(iter(idle))
        oldest.release()
        if oldest.abort is not None:
            oldest.abort()
        return None

    def _log(self, setting: str) -> None:
        """Logs one line per episode, however many connections are limited in it."""
        now = self._clock()
        if now - self._last_limited.get(setting, -LOG_PAUSE) >= LOG_PAUSE:
            limit = getattr(
                self._limits, "total" if setting == "max_connections" else "per_address"
            )
            log.warning(
                "%s port: %d connections are open, the limit of %s; idle connections are closed to"
                " admit new ones, which are refused if none is idle",
                self._port,
                limit,
                setting,
            )
        self._last_limited[setting] = now

    # --- what slots report ----------------------------------------------------------------
    def mark_idle(self, slot: Slot) -> None:
        for order in (self._idle, self._groups[slot.address].idle):
            order[slot] = None
            order.move_to_end(slot)

    def mark_busy(self, slot: Slot) -> None:
        self._idle.pop(slot, None)
        if slot.address in self._groups:
            self._groups[slot.address].idle.pop(slot, None)

    def remove(self, slot: Slot) -> None:
        if slot.refusal is not None:
            self._num_refused -= 1
            return
        self.mark_busy(slot)
        group = self._groups[slot.address]
        group.count -= 1
        if not group.count:
            del self._groups[slot.address]
        self._set_count(self._count - 1)

    def _set_count(self, count: int) -> None:
        self._count = count
        self._observer.connections_open(self._port, count)


def address_group(host: str) -> str:
    """Returns the unit that counts as one address: an IPv4 address or an IPv6 /64 network."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
