"""WorkTable: the requests that a worker has claimed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from service.engine.thread import EngineThread
from service.messages import End, Tokens, merge_tokens
from service.queues.contract import Claim, Lease
from service.worker.observer import WorkerObserver


@dataclass(slots=True)
class LeasedWork:
    """A claimed request. Its records are kept to its end, to close a GAP: as they were sent, and
    from `sent` on as they came.
    """

    claim: Claim
    since: float
    records: list[Tokens] = field(default_factory=list)
    sent: int = 0
    sent_at: float = 0.0
    written: int = 0  # tokens that are known to be in the journal
    ending: bool = False  # its end is being written; the reply is still to come

    @property
    def lease(self) -> Lease:
        return self.claim.lease

    def take_unsent(self, now: float) -> Tokens:
        """Merges the records that were not sent yet: they are sent as one."""
        merged = merge_tokens(self.records[self.sent :])
        self.records[self.sent :] = [merged]
        self.sent, self.sent_at = len(self.records), now
        return merged

    @property
    def is_isolated(self) -> bool:
        """Whether it has not passed the position at which engines died."""
        until = self.claim.isolated_until
        return until is not None and self.written <= until


class WorkTable:
    """Leased work by request id. Used in the event loop, except `has_isolated`.

    `room_changed` is set when a request leaves the engine. The parts of a worker share the table's
    `engine`, `observer` and `clock`.
    """

    def __init__(
        self, engine: EngineThread, observer: WorkerObserver, *, clock: Callable[[], float]
    ) -> None:
        self.items: dict[str, LeasedWork] = {}
        self.room_changed = asyncio.Event()
        self.engine = engine
        self.observer = observer
        self.clock = clock
        self._isolated: set[str] = set()

    @property
    def leases(self) -> list[Lease]:
        return [work.lease for work in self.items.values()]

    @property
    def has_isolated(self) -> bool:
        """Whether any request is isolated. Any thread."""
        return bool(self._isolated)

    def has_attempt(self, attempt: int) -> bool:
        """Whether an isolated request is at this attempt or a later one."""
        return any(self.items[each].claim.attempt >= attempt for each in self._isolated)

    def add(self, claim: Claim) -> None:
        request_id = claim.request.id
        late = self.items.get(request_id)
        if late is not None:  # this engine's own, whose lease expired
            self.observer.released(late.claim, "lease_lost", written=late.written)
        self.observer.claimed(claim)
        self.items[request_id] = LeasedWork(claim, self.clock(), written=len(claim.tokens))
        self._isolated.add(request_id)
        self._update_isolated(request_id)

    def journalled(self, work: LeasedWork, count: int) -> None:
        """Records that the journal has `count` tokens."""
        if work.written == len(work.claim.tokens) < count:
            self.observer.first_token(work.claim.request.id)
        work.written = count
        self._update_isolated(work.claim.request.id)

    def finish(self, work: LeasedWork, end: End) -> None:
        """Removes a request whose end is in the journal."""
        self.pop(work.claim.request.id)
        self.room_changed.set()
        self.observer.ended(end, self.clock() - work.since)
        self.observer.released(work.claim, end.reason.value, written=end.count, end=end)

    def drop(self, request_id: str, *, cause: str) -> None:
        """Removes a request and aborts it in the engine. Unknown ids are ignored."""
        work = self.pop(request_id)
        if work is None:
            return
        self.engine.abort(request_id)
        self.room_changed.set()
        self.observer.wasted(sum(len(record.ids) for record in work.records), cause)
        self.observer.released(work.claim, cause, written=work.written)

    def leave(self, request_id: str, *, cause: str) -> None:
        """Removes a request that the engine cannot abort now. Unknown ids are ignored."""
        work = self.pop(request_id)
        if work is not None:
            self.observer.released(work.claim, cause, written=work.written)

    def pop(self, request_id: str) -> LeasedWork | None:
        self._isolated.discard(request_id)
        return self.items.pop(request_id, None)

    def _update_isolated(self, request_id: str) -> None:
        if not self.items[request_id].is_isolated:
            self._isolated.discard(request_id)
