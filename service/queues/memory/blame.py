"""Blame: which requests engine deaths count against, and which of them are isolated, in memory.

The Redis queue keeps the same in `shared.lua` and `claim.lua`; the rules are those of
`service.queues`. It decides nothing about leases: the queue asks when one has run out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from service.queues.contract import FINAL_SILENCE, JOIN_AFTER, EngineInfo, QueueLimits
from service.queues.memory.entry import Entry


class Blame:
    """`engines`: id -> (last sign of life, report). Times are the queue's own clock's, in seconds.
    `freed` is called when suspects that wait may be isolated.
    """

    def __init__(
        self,
        limits: QueueLimits,
        *,
        clock: Callable[[], float],
        engines: Mapping[str, tuple[float, EngineInfo]],
        freed: Callable[[], None],
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._engines = engines
        self._freed = freed
        self._suspects: dict[str, Entry] = {}  # those that wait for isolation, oldest first
        self._lane: dict[str, Entry] = {}  # those that are isolated
        self._isolates: dict[str, float] = {}  # engine -> when it took its last group
        # engine -> when its death was noted, and the requests that it counts against
        self._blamed: dict[str, tuple[float, dict[str, Entry]]] = {}

    def __len__(self) -> int:
        """Requests that wait for isolation or are isolated."""
        return len(self._suspects) + len(self._lane)

    def settle(self, entry: Entry, engine: EngineInfo) -> bool | None:
        """Finds out, for an engine that looks for work, why a lease is over. True: the request can
        go on. False: it has to be failed. None: that is not certain yet.
        """
        owner = entry.engine
        silence = self._silence(owner)
        heard_since = self._clock() - silence > entry.lease_until
        if not owner or owner == engine.id or heard_since:
            return True  # released; or late, not dead
        final = self._is_condemned(entry) and not self._is_bystander(entry)
        if silence < self._limits.lease * (FINAL_SILENCE if final else 1):
            return None
        return not self.died(entry)

    def died(self, entry: Entry) -> bool:
        """Counts the death of the engine that runs a request; whether the request is failed."""
        if self._is_bystander(entry):
            return False
        condemned = self._is_condemned(entry)
        self._count(entry)
        return condemned

    def leave(self, entry: Entry) -> None:
        """Nobody runs the request any more, for now: a suspect waits for its isolation."""
        self._leave_lane(entry)
        if entry.blamers:
            self._suspects.setdefault(entry.request.id, entry)

    def ended(self, entry: Entry) -> None:
        """The request needs no engine any more."""
        self._leave_lane(entry)
        self._suspects.pop(entry.request.id, None)

    def progressed(self, entry: Entry) -> None:
        """Clears a request that is far enough past the position at which engines died."""
        if not entry.isolated_by:
            return
        if entry.count > entry.cleared_after:
            self._leave_lane(entry)
            entry.blamers.clear()
        elif self._suspects and entry.has_passed:
            self._freed()

    def heard(self, engine: str) -> None:
        """Takes back what the death of an engine counted against, if one was counted."""
        if engine not in self._blamed:
            return
        for entry in self._blamed.pop(engine)[1].values():
            if engine in entry.blamers:
                entry.blamers.remove(engine)
            if not entry.blamers:
                self.ended(entry)
        self._forget_isolation(engine)

    def forget(self, keep: float) -> None:
        """Drops what is too old to be taken back."""
        oldest = self._clock() - keep
        for engine in [name for name, (since, _) in self._blamed.items() if since < oldest]:
            del self._blamed[engine]
        for engine in [name for name, since in self._isolates.items() if since < oldest]:
            del self._isolates[engine]

    def next_group(self, engine: EngineInfo, *, limit: int) -> Sequence[Entry]:
        """The suspects to isolate in this engine now, at most `limit`; none while another does."""
        held = [entry for entry in self._lane.values() if self._is_held(entry)]
        condemned = any(self._has_last_attempt(entry) for entry in held)
        young = not all(entry.has_passed for entry in held)
        young &= self._clock() - self._isolates.get(engine.id, 0.0) < JOIN_AFTER
        if held and (condemned or young or any(entry.engine != engine.id for entry in held)):
            return ()
        suspects = [entry for entry in self._suspects.values() if entry.may_run(engine)]
        if not suspects or limit <= 0:
            return ()
        if self._has_last_attempt(suspects[0]):
            return () if held else suspects[:1]
        group = [entry for entry in suspects if not self._has_last_attempt(entry)]
        return group[: min(limit, -(-len(group) // 2))]

    def isolate(self, entry: Entry, engine: EngineInfo) -> None:
        """Notes that an engine has taken a suspect out of `next_group`."""
        self._suspects.pop(entry.request.id, None)
        self._lane[entry.request.id] = entry
        self._isolates[engine.id] = self._clock()
        entry.isolated_by = engine.id

    def _silence(self, engine: str) -> float:
        seen = self._engines.get(engine)
        return float("inf") if seen is None else self._clock() - seen[0]

    def _is_held(self, entry: Entry) -> bool:
        return bool(entry.owner) and entry.lease_until > self._clock()

    def _has_last_attempt(self, entry: Entry) -> bool:
        return len(entry.blamers) + 1 >= self._limits.max_attempts

    def _is_bystander(self, entry: Entry) -> bool:
        return not entry.isolated_by and entry.engine in self._isolates

    def _is_condemned(self, entry: Entry) -> bool:
        """Whether one more death fails it."""
        near = entry.died_at is not None and entry.count <= entry.cleared_after
        deaths = len(entry.blamers) + 1 if near else 1
        return deaths >= self._limits.max_attempts and not (near and entry.count != entry.died_at)

    def _count(self, entry: Entry) -> None:
        condemned = self._is_condemned(entry)
        if entry.died_at is None or entry.count > entry.cleared_after:
            entry.blamers.clear()
        entry.blamers.append(entry.engine)
        while not condemned and 1 < len(entry.blamers) >= self._limits.max_attempts:
            del entry.blamers[0]
        entry.died_at = entry.count
        _, requests = self._blamed.setdefault(entry.engine, (self._clock(), {}))
        requests[entry.request.id] = entry
        self._leave_lane(entry, died=True)

    def _leave_lane(self, entry: Entry, *, died: bool = False) -> None:
        engine, entry.isolated_by = entry.isolated_by, ""
        if not engine:
            return
        del self._lane[entry.request.id]
        if not died:
            self._forget_isolation(engine)
        if self._suspects and not self._lane:
            self._freed()

    def _forget_isolation(self, engine: str) -> None:
        if all(entry.isolated_by != engine for entry in self._lane.values()):
            self._isolates.pop(engine, None)
