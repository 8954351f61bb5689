"""Affinity: which engines hold the prefixes of queued requests, in memory.

The rules are in `service.queues.contract`; the Redis queue implements them in `affinity.lua`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from service.queues.contract import (
    ENGINE_SILENCE,
    HELD_FOR,
    MAX_HOLDERS,
    OVERLOADED,
    RESERVED_FOR,
    EngineInfo,
)

NOTHING: tuple[float, frozenset[str]] = (0.0, frozenset())


class Affinity:
    """`engines`: id -> (last heartbeat, report). Times are from the queue's clock, in seconds."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        engines: Mapping[str, tuple[float, EngineInfo]],
    ) -> None:
        self._clock = clock
        self._engines = engines
        self._held: dict[str, tuple[float, frozenset[str]]] = {}  # engine -> when, prefixes
        self._reserved: dict[str, tuple[float, str]] = {}  # request -> until, prefix

    def hold(self, engine: str, prefixes: Collection[str]) -> None:
        """See `Queue.hold`."""
        self._held = {name: held for name, held in self._held.items() if name in self._engines}
        self._held[engine] = (self._clock(), frozenset(prefixes))

    def reserve(self, request_id: str, prefixes: Sequence[str]) -> None:
        """Reserves a queued request for the holders of its longest prefix that is held."""
        if len(self._engines) < 2:
            return
        for prefix in prefixes:
            holders = self._holders(prefix)
            if holders:
                if len(holders) <= MAX_HOLDERS:
                    self._reserved[request_id] = (self._clock() + RESERVED_FOR, prefix)
                return

    def left_for(self, request_id: str, engine: EngineInfo) -> float | None:
        """Seconds for which a queued request is left to others; None if `engine` may take it."""
        until, prefix = self._reserved.get(request_id, (0.0, ""))
        left = until - self._clock()
        if left <= 0 or prefix in self._held.get(engine.id, NOTHING)[1]:
            return None
        most = 2 * engine.running + OVERLOADED
        return left if any(each.running <= most for each in self._holders(prefix)) else None

    def discard(self, request_id: str) -> None:
        """Forgets a request that is not queued any more."""
        self._reserved.pop(request_id, None)

    def _holders(self, prefix: str) -> list[EngineInfo]:
        """The engines that hold it and are listed."""
        now = self._clock()
        silent, forgotten = now - ENGINE_SILENCE, now - HELD_FOR
        return [
            self._engines[engine][1]
            for engine, (at, held) in self._held.items()
            if prefix in held and at > forgotten
            if engine in self._engines and self._engines[engine][0] > silent
        ]
