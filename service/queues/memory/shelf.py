"""Shelf: all submissions that the queue in memory holds, and their bytes. The Redis queue keeps the
same in `submit.lua`, `shared.lua` and `sweep.lua`.

A submission counts from its admission: each request's body until the request has ended, the rest
until the submission is gone, which is a resume window after its last request ended. An idempotency
record counts until its own time is over.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from service.messages import Submission
from service.queues.admission import RECORD_BYTES, kept_bytes, request_bytes, stored_bytes
from service.queues.contract import QueueLimits, SubmitStatus
from service.queues.memory.entry import Entry, Group


class Shelf:
    """Groups and entries by their ids. Times are the queue's own clock's."""

    def __init__(self, limits: QueueLimits, *, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self.entries: dict[str, Entry] = {}
        self.groups: dict[str, Group] = {}
        self._keys: dict[tuple[str, str], tuple[str, str, float]] = {}  # -> id, fingerprint, until
        self._fading: deque[tuple[float, str]] = deque()  # (forget at, submission), in that order
        self._bytes: Counter[str] = Counter()  # tenant -> bytes

    def __len__(self) -> int:
        """Records and counters."""
        records = len(self.entries) + len(self.groups) + len(self._keys) + len(self._fading)
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

    def put(self, submission: Submission, entries: list[Entry], *, now: float) -> None:
        """Holds and counts what was admitted."""
        kept = kept_bytes(submission)
        group = Group.of(submission, entries, now=now, kept_bytes=kept)
        self.groups[submission.id] = group
        self._bytes[submission.tenant] += kept
        for entry in entries:
            self.entries[entry.request.id] = entry
            self._bytes[submission.tenant] += request_bytes(entry.request)
        if submission.idempotency_key is not None:
            until = now + self._limits.idempotency_ttl
            key = (submission.tenant, submission.idempotency_key)
            self._keys[key] = (submission.id, submission.fingerprint, until)
            self._bytes[submission.tenant] += RECORD_BYTES

    def earlier(self, submission: Submission) -> tuple[str, str] | None:
        """Id and fingerprint of the submission that had the same idempotency key."""
        if submission.idempotency_key is None:
            return None
        known = self._keys.get((submission.tenant, submission.idempotency_key))
        return None if known is None or known[2] <= self._clock() else known[:2]

    def ended(self, entry: Entry) -> None:
        """Lets the body go; the last one's end begins the resume window."""
        group = self.groups[entry.submission_id]
        self._count_down(group.stored.tenant, request_bytes(entry.request))
        group.unfinished -= 1
        if not group.unfinished:
            self._fading.append((self._clock() + self._limits.resume_window, entry.submission_id))

    def forget(self) -> None:
        """Drops what is over its time."""
        now = self._clock()
        while self._fading and self._fading[0][0] <= now:
            self.drop(self._fading.popleft()[1])
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
        self._count_down(group.stored.tenant, group.kept_bytes)
        for entry in group.entries:
            del self.entries[entry.request.id]

    def _count_down(self, tenant: str, size: int) -> None:
        self._bytes[tenant] -= size
        if not self._bytes[tenant]:
            del self._bytes[tenant]
