"""Entry and Group: what the queue in memory keeps of a request and of a submission."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from service.errors import StreamDivergence
from service.messages import Allowance, End, GenerationRequest, Record, Submission, Tokens
from service.queues.contract import (
    CLEARED_AFTER,
    PASSED_AFTER,
    Claim,
    EngineInfo,
    Lease,
    StoredSubmission,
    WriteStatus,
)

LOOK_AGAIN = 0.05
"""Seconds between two looks at a request whose lease is over, and which cannot be claimed yet."""


@dataclass(slots=True)
class Entry:
    """One request. `epoch` grows with each claim and stop; `owner` is empty while nobody runs it.

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
    journal: list[Tokens] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # journal[i].end, ascending
    followers: set[asyncio.Event] = field(default_factory=set)

    @property
    def count(self) -> int:
        """Tokens journalled."""
        return self.ends[-1] if self.ends else 0

    @property
    def engine(self) -> str:
        """The id of the engine that runs it; empty if none does."""
        return self.owner.rpartition(":")[0]

    @property
    def cleared_after(self) -> int:
        """Tokens past which the deaths of `blamers` do not count any more."""
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
        """Whether an engine may run it: a begun answer stays in its numeric class."""
        same_class = not self.count or self.numeric_class == engine.numeric_class
        return same_class and set(self.request.features) <= set(engine.features)

    def claim(self, *, now: float, waited_ms: int | None) -> Claim:
        """What the engine that owns it is told."""
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
        self.ends.append(record.end)
        self.wake()
        return WriteStatus.OK

    def beyond(self, after: int, *, most: int | None = None) -> list[Record]:
        """The records beyond `after` tokens; with `most`, the first of them, of so many tokens."""
        first, until = bisect_right(self.ends, after), len(self.journal)
        if most is not None:
            until = max(first + 1, bisect_right(self.ends, after + most))
        records: list[Record] = list(self.journal[first:until])
        if self.end is not None and until >= len(self.journal):
            records.append(reached(self.end, after=after))
        return records

    def holds(self, lease: Lease) -> bool:
        """Whether the lease's is the last claim of this request."""
        return self.epoch == lease.epoch and self.owner == lease.owner

    def wake(self) -> None:
        for follower in self.followers:
            follower.set()


@dataclass(slots=True)
class Group:
    """A submission, kept until `resume_window` after the last of its requests ended. `kept_bytes`
    are counted for it until then.
    """

    stored: StoredSubmission
    unfinished: int
    entries: Sequence[Entry]
    grace: float | None
    attended: float
    allowance: Allowance | None
    kept_bytes: int

    @classmethod
    def of(
        cls, submission: Submission, entries: Sequence[Entry], *, now: float, kept_bytes: int
    ) -> Self:
        """What is kept of a submission that is admitted."""
        stored = StoredSubmission(
            id=submission.id,
            tenant=submission.tenant,
            manifest=submission.manifest,
            num_requests=len(entries),
        )
        return cls(
            stored,
            len(entries),
            entries,
            submission.grace,
            attended=now,
            allowance=submission.allowance,
            kept_bytes=kept_bytes,
        )


def oldest_age(waiting: Iterable[Mapping[str, Entry]], *, now: float) -> float | None:
    """Seconds that the first of the waiting ones has waited; each of the maps is in their order."""
    first = (next(iter(entries.values())) for entries in waiting if entries)
    return max((now - entry.submitted for entry in first), default=None)


def next_lease_end(running: Iterable[Entry], *, now: float, default: float) -> float:
    """Seconds until another running request may be claimed again; `LOOK_AGAIN` at least."""
    left = (max(entry.lease_until - now, LOOK_AGAIN) for entry in running)
    return min(left, default=default)


def reached(end: End, *, after: int) -> End:
    """The end of an answer, where the answer is as long as its reader was sent already."""
    if end.count < after:
        raise StreamDivergence("the journal ends before what was sent already")
    return end
