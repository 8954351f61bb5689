"""Submissions: the requests that the queue in memory holds, and their stored bytes.

A submission counts from its admission: each request's body until the request has ended, the rest
until the submission is gone, a resume window after its last request ended or, if it is *kept*,
later. The tokens of what is kept count from its end on, and it can be evicted. An idempotency
record counts until it expires. The Redis queue does the same in `storage.lua` and `sweep.lua`.
"""

from __future__ import annotations

import asyncio
import heapq
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from service.errors import StreamDivergence
from service.messages import End, GenerationRequest, Record, Submission, Tokens
from service.queues.admission import (
    RECORD_BYTES,
    base_bytes,
    kept_bytes,
    request_bytes,
    stored_bytes,
    token_bytes,
)
from service.queues.contract import (
    CLEARED_AFTER,
    MAX_EVICTED,
    PASSED_AFTER,
    Claim,
    EngineInfo,
    Lease,
    QueueLimits,
    StoredSubmission,
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
    size: int  # bytes without the bodies
    base_size: int  # those that also count if it is not kept
    window_ends: float = 0.0  # when the resume window is over
    gone_at: float = 0.0

    @property
    def is_kept(self) -> bool:
        """Whether it can be read for longer than its resume window."""
        return self.submission.keep is not None

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
        self._expiring: list[tuple[float, str]] = []  # heap of (time, submission)
        self._bytes: Counter[str] = Counter()  # by tenant
        self._kept: defaultdict[str, dict[str, int]] = defaultdict(dict)  # tenant -> id -> bytes
        self._kept_bytes: Counter[str] = Counter()  # by tenant

    def __len__(self) -> int:
        """Records and counters."""
        records = len(self.entries) + len(self.groups) + len(self._keys) + len(self._expiring)
        return records + len(self._bytes) + sum(map(len, self._kept.values()))

    @property
    def stored_bytes(self) -> int:
        """Of all tenants."""
        return self._bytes.total()

    def tenant_has_room(self, submission: Submission) -> bool:
        """Whether it is within the limit of its tenant. Evicts what the tenant keeps."""
        tenant, most = submission.tenant, self._limits.max_tenant_bytes - stored_bytes(submission)
        return most >= 0 and self._make_room(lambda: self._bytes[tenant] <= most, tenant)

    def has_room(self, submission: Submission) -> bool:
        """Whether it is within the limit of all tenants. Evicts what is kept."""
        most = self._limits.max_bytes - stored_bytes(submission)
        return most >= 0 and self._make_room(lambda: self.stored_bytes <= most, None)

    def _make_room(self, fits: Callable[[], bool], tenant: str | None) -> bool:
        """Evicts until it fits: of one tenant or, without it, of the one that keeps most."""
        for _ in range(MAX_EVICTED):
            if fits():
                return True
            keeper = tenant or max(self._kept, key=self._kept_bytes.__getitem__, default=None)
            if keeper is None or not self._evict(keeper):
                return False
        return fits()

    def _evict(self, tenant: str) -> bool:
        """Ends the keeping of the oldest; returns false if there is none."""
        if tenant not in self._kept:
            return False
        submission_id = next(iter(self._kept[tenant]))
        group = self.groups[submission_id]
        if group.window_ends <= self._clock():
            self.drop(submission_id)
            return True
        self._unkeep(group)
        self._count_down(tenant, group.size - group.base_size)
        group.submission = replace(group.submission, keep=None, input="")
        group.size = group.base_size
        self._expire_at(group, group.window_ends)
        return True

    def put(self, submission: Submission, entries: Sequence[Entry], *, now: float) -> None:
        """Stores and counts what was admitted."""
        self.groups[submission.id] = Group(
            submission,
            entries,
            unfinished=len(entries),
            heartbeat=now,
            size=kept_bytes(submission),
            base_size=base_bytes(submission),
        )
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
        if group.unfinished:
            return
        if group.is_kept:
            self._count_answers(group)
        self.keep(group)

    def _count_answers(self, group: Group) -> None:
        """Counts the tokens of what is kept, and drops the bodies."""
        submission = group.submission
        size = token_bytes(submission) * sum(entry.count for entry in group.entries)
        group.size += size
        self._bytes[submission.tenant] += size
        group.submission = replace(submission, requests=())
        for entry in group.entries:
            entry.request = replace(entry.request, prompt_ids=(), grammar=None, stop=())

    def keep(self, group: Group) -> None:
        """Starts the time for which an ended submission can be read."""
        submission, now = group.submission, self._clock()
        group.window_ends = now + self._limits.resume_window
        self._expire_at(group, max(group.window_ends, now + (submission.keep or 0.0)))
        if group.is_kept:
            self._unkeep(group)  # the last of them is the newest
            self._kept[submission.tenant][submission.id] = group.size
            self._kept_bytes[submission.tenant] += group.size

    def _expire_at(self, group: Group, time: float) -> None:
        is_sooner = not group.gone_at or time < group.gone_at
        group.gone_at = time
        if is_sooner:  # otherwise `expire` looks again
            heapq.heappush(self._expiring, (time, group.submission.id))

    def _unkeep(self, group: Group) -> None:
        tenant = group.submission.tenant
        self._kept_bytes[tenant] -= self._kept[tenant].pop(group.submission.id, 0)
        if not self._kept[tenant]:
            del self._kept[tenant], self._kept_bytes[tenant]

    def expire(self) -> None:
        """Drops what has expired."""
        now = self._clock()
        while self._expiring and self._expiring[0][0] <= now:
            _, submission_id = heapq.heappop(self._expiring)
            group = self.groups.get(submission_id)
            if group is not None and group.gone_at > now:
                heapq.heappush(self._expiring, (group.gone_at, submission_id))
            else:
                self.drop(submission_id)
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
        self._count_down(group.submission.tenant, group.size)
        self._unkeep(group)
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
