"""Connections: how many a port holds, and which of them gives way to the next.

    idle    waits for a request, or for the rest of one: closed if its place is needed, the one that
            has waited longest first
    busy    an answer is being made or sent: never closed for another

An address at its limit makes room among its own connections, a full port among all of them. If none
is idle, the new connection is refused: with an answer, or, if too many are being refused, without.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from service.errors import QuireError, RateLimited, Unavailable

log = logging.getLogger("quire")

QUIET = 60.0
"""Seconds without a closed or refused connection after which the next one is logged again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Open connections of one port."""

    total: int = 8192
    per_address: int = 8192
    refused: int = 32  # that are being answered so


class Outcome(StrEnum):
    """What a limit did: closed an idle connection, or refused a new one."""

    CLOSED = "closed"
    REFUSED = "refused"


class ConnectionObserver(Protocol):
    """Is given what metrics count. Called in the event loop."""

    def connections_open(self, port: str, count: int) -> None:
        """The number of connections of a port, after it changed."""
        ...

    def connection_limited(self, port: str, outcome: Outcome) -> None:
        """A limit closed or refused a connection."""
        ...


class NullConnectionObserver:
    """Counts nothing."""

    def connections_open(self, port: str, count: int) -> None:
        """Ignored."""

    def connection_limited(self, port: str, outcome: Outcome) -> None:
        """Ignored."""


@dataclass(slots=True)
class _Group:
    """The connections of one address."""

    count: int = 0
    idle: OrderedDict[Slot, None] = field(default_factory=OrderedDict)


class Slot:
    """The place of one connection. If `refusal` is set, the connection gets only that answer."""

    def __init__(self, pool: Connections, address: str, refusal: QuireError | None) -> None:
        self.address = address
        self.refusal = refusal
        self.abort: Callable[[], None] | None = None  # set when the connection is made
        self._pool: Connections | None = pool

    def idle(self) -> None:
        """The connection begins to wait, now."""
        if self._pool is not None and self.refusal is None:
            self._pool.mark_idle(self)

    def busy(self) -> None:
        """An answer is being made."""
        if self._pool is not None:
            self._pool.mark_busy(self)

    def release(self) -> None:
        """The connection is gone. May be called again."""
        if self._pool is not None:
            self._pool.remove(self)
            self._pool = None


class Connections:
    """The places of one port. `port` is its name in logs and metrics."""

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
        self._observer = observer or NullConnectionObserver()
        self._clock = clock
        self._groups: dict[str, _Group] = {}
        self._idle: OrderedDict[Slot, None] = OrderedDict()
        self._count = 0
        self._num_refused = 0  # of those that are being answered
        self._last_limited: dict[str, float] = {}  # kind of limit -> when it was last reached

    def __len__(self) -> int:
        return self._count

    def admit(self, host: str) -> Slot | None:
        """A place for a new connection; None if it is to be closed at once."""
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
        # Looked up again: the group may have gone with its last connection.
        self._groups.setdefault(address, group).count += 1
        self._set_count(self._count + 1)
        return Slot(self, address, None)

    def _make_room(
        self, idle: OrderedDict[Slot, None], refusal: QuireError, *, setting: str
    ) -> QuireError | None:
        """Closes the connection that has been idle longest. If there is none, the refusal."""
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
        """One line for an episode, however many connections it has."""
        now = self._clock()
        if now - self._last_limited.get(setting, -QUIET) >= QUIET:
            limit = getattr(
                self._limits, "total" if setting == "max_connections" else "per_address"
            )
            log.warning(
                "%s port: %d connections are open, the limit of %s; idle ones are closed for new"
                " ones, and new ones are refused if none is idle",
                self._port,
                limit,
                setting,
            )
        self._last_limited[setting] = now

    # --- what slots report ----------------------------------------------------------------
    def mark_idle(self, slot: Slot) -> None:
        """Puts the connection at the end of those that wait."""
        for order in (self._idle, self._groups[slot.address].idle):
            order[slot] = None
            order.move_to_end(slot)

    def mark_busy(self, slot: Slot) -> None:
        """Takes the connection out of those that wait."""
        self._idle.pop(slot, None)
        if slot.address in self._groups:
            self._groups[slot.address].idle.pop(slot, None)

    def remove(self, slot: Slot) -> None:
        """Gives the place to others."""
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
    """What counts as one address: an IPv4 address, or the /64 network that an IPv6 host has."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
