"""Submissions: the requests that the queue in memory holds, and their stored bytes.

A submission counts from its admission: each request's body until the request has ended, the rest
until the submission is gone, which is a resume window after its last request ended. An idempotency
record counts until it expires. The Redis queue keeps the same in `submit.lua`, `requests.lua` and
`sweep.lua`.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from service.errors import StreamDivergence
from service.messages import End, GenerationRequest, Record, Submission, Tokens
from service.queues.admission import RECORD_BYTES, kept_bytes, request_bytes, stored_bytes
from service.queues.contract import (
    CLEARED_AFTER,
    PASSED_AFTER,
    Claim,
    EngineInfo,
    Lease,
    QueueLimits,
    StoredSubmission,
    SubmitStatus,
    WriteStatus,
)

_END = attrgetter("end")


@dataclass(slots=True)
class Entry:
    """One request. `epoch` grows with each claim and stop; `owner` is empty while it is not leased.

    queued: not `started`, no `end` · running: `started`, no `end` · ended: `end`
    """

    request: GenerationRequest
    submission_id: str
    submitted: float
    turn: float
    started: bool = False
    end: End | None = None
    epoch: int = 0
    owner: str = ""
    lease_until: float = 0.0
    blamers: list[str] = field(default_factory=list)  # engines that died on it near `died_at`
    died_at: int | None = None  # tokens journalled when the last of them died
    isolated_by: str = ""  # the engine that isolates it
    numeric_class: str = ""
    journal: list[Tokens] = field(default_factory=list)  # ends ascending
    followers: set[asyncio.Event] = field(default_factory=set)

    @property
    def count(self) -> int:
        """Tokens journalled."""
        return self.journal[-1].end if self.journal else 0

    @property
    def engine(self) -> str:
        """The id of the engine that runs it, or empty."""
        return self.owner.rpartition(":")[0]

    @property
    def cleared_after(self) -> int:
        """Tokens past which the deaths of `blamers` no longer count."""
        return (self.died_at or 0) + CLEARED_AFTER

    @property
    def has_passed(self) -> bool:
        """Whether it is past the position at which the last engine died."""
        return self.count > (self.died_at or 0) + PASSED_AFTER

    @property
    def deadline(self) -> float | None:
        timeout_ms = self.request.timeout_ms
        return None if timeout_ms is None else self.submitted + timeout_ms / 1000

    def may_run(self, engine: EngineInfo) -> bool:
        """Whether an engine may run it: an answer stays in the numeric class that began it."""
        same_class = not self.count or self.numeric_class == engine.numeric_class
        return same_class and set(self.request.features) <= set(engine.features)

    def claim(self, *, now: float, waited_ms: int | None) -> Claim:
        """The claim of the engine that owns it."""
        deadline = self.deadline
        return Claim(
            lease=Lease(self.request.id, self.epoch, self.owner),
            request=self.request,
            tokens=tuple(token for record in self.journal for token in record.ids),
            attempt=len(self.blamers) + 1,
            isolated_until=self.cleared_after if self.isolated_by else None,
            remaining_ms=None if deadline is None else max(0, round((deadline - now) * 1000)),
            waited_ms=waited_ms,
        )

    def append(self, record: Tokens) -> WriteStatus:
        """Journals tokens that continue what is there."""
        if self.count >= record.end:
            return WriteStatus.DUP
        if self.end is not None:
            return WriteStatus.FENCED
        if self.count != record.start:
            return WriteStatus.GAP
        self.journal.append(record)
        self.wake()
        return WriteStatus.OK

    def index_after(self, count: int) -> int:
        """Index of the first record that reaches beyond `count` tokens."""
        return bisect_right(self.journal, count, key=_END)

    def beyond(self, after: int, *, most: int | None = None) -> list[Record]:
        """The records beyond `after` tokens; with `most`, the first of them, of so many tokens."""
        first, until = self.index_after(after), len(self.journal)
        if most is not None:
            until = max(first + 1, self.index_after(after + most))
        records: list[Record] = list(self.journal[first:until])
        if self.end is not None and until >= len(self.journal):
            records.append(checked_end(self.end, after=after))
        return records

    def holds(self, lease: Lease) -> bool:
        """Whether the lease is from the last claim of this request."""
        return self.epoch == lease.epoch and self.owner == lease.owner

    def wake(self) -> None:
        for follower in self.followers:
            follower.set()


@dataclass(slots=True)
class Group:
    """The requests of one submission; `heartbeat` is the last one of its readers."""

    submission: Submission
    entries: Sequence[Entry]
    unfinished: int
    heartbeat: float

    @property
    def stored(self) -> StoredSubmission:
        return StoredSubmission(
            id=self.submission.id,
            tenant=self.submission.tenant,
            manifest=self.submission.manifest,
            num_requests=len(self.entries),
        )


class Submissions:
    """Groups and entries by their ids. Times are from the queue's clock."""

    def __init__(self, limits: QueueLimits, *, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self.entries: dict[str, Entry] = {}
        self.groups: dict[str, Group] = {}
        self._keys: dict[tuple[str, str], tuple[str, str, float]] = {}  # -> id, fingerprint, until
        self._expiring: deque[tuple[float, str]] = deque()  # (time, submission), in that order
        self._bytes: Counter[str] = Counter()  # by tenant

    def __len__(self) -> int:
        """Records and counters."""
        records = len(self.entries) + len(self.groups) + len(self._keys) + len(self._expiring)
        return records + len(self._bytes)

    @property
    def stored_bytes(self) -> int:
        """Of all tenants."""
        return self._bytes.total()

    def refusal(self, submission: Submission) -> SubmitStatus | None:
        """TENANT_STORAGE or STORAGE, or None if there is room for it."""
        size = stored_bytes(submission)
        if self._bytes[submission.tenant] + size > self._limits.max_tenant_bytes:
            return SubmitStatus.TENANT_STORAGE
        full = self.stored_bytes + size > self._limits.max_bytes
        return SubmitStatus.STORAGE if full else None

    def put(self, submission: Submission, entries: Sequence[Entry], *, now: float) -> None:
        """Stores and counts what was admitted."""
        self.groups[submission.id] = Group(submission, entries, len(entries), heartbeat=now)
        self.entries.update((entry.request.id, entry) for entry in entries)
        self._bytes[submission.tenant] += stored_bytes(submission)
        if submission.idempotency_key is not None:
            until = now + self._limits.idempotency_ttl
            key = (submission.tenant, submission.idempotency_key)
            self._keys[key] = (submission.id, submission.fingerprint, until)

    def earlier(self, submission: Submission) -> tuple[str, str] | None:
        """Id and fingerprint of the submission that had the same idempotency key."""
        if submission.idempotency_key is None:
            return None
        known = self._keys.get((submission.tenant, submission.idempotency_key))
        return None if known is None or known[2] <= self._clock() else known[:2]

    def ended(self, entry: Entry) -> None:
        """Stops counting the body; the end of the last request starts the resume window."""
        group = self.groups[entry.submission_id]
        self._count_down(group.submission.tenant, request_bytes(entry.request))
        group.unfinished -= 1
        if not group.unfinished:
            gone = self._clock() + self._limits.resume_window
            self._expiring.append((gone, entry.submission_id))

    def expire(self) -> None:
        """Drops what has expired."""
        now = self._clock()
        while self._expiring and self._expiring[0][0] <= now:
            self.drop(self._expiring.popleft()[1])
        while self._keys:
            oldest = next(iter(self._keys))
            if self._keys[oldest][2] > now:
                break
            del self._keys[oldest]
            self._count_down(oldest[0], RECORD_BYTES)

    def drop(self, submission_id: str) -> None:
        """Drops a submission that has ended."""
        group = self.groups.pop(submission_id, None)
        if group is None:
            return
        self._count_down(group.submission.tenant, kept_bytes(group.submission))
        for entry in group.entries:
            del self.entries[entry.request.id]

    def _count_down(self, tenant: str, size: int) -> None:
        self._bytes[tenant] -= size
        if not self._bytes[tenant]:
            del self._bytes[tenant]


def checked_end(end: End, *, after: int) -> End:
    """Raises StreamDivergence if the answer is shorter than what its reader was sent."""
    if end.count < after:
        raise StreamDivergence("the journal ends before what was sent already")
    return end
