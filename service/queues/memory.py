"""MemoryQueue: the whole state machine in one asyncio process, for the embedded default and tests.

It keeps what the Redis queue keeps, with the same replies, but not beyond the life of the process.
All methods run on one event loop; no thread may call them. Reading costs what is new, not what is
there: followers hold an index into the journal and are woken, they never poll.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from service.errors import NotFound, Unavailable
from service.messages import End, FinishReason, Record, Submission, Tokens
from service.queues import (
    PAGE_TOKENS,
    Claim,
    EngineInfo,
    Lease,
    QueueDepth,
    QueueLimits,
    StoredSubmission,
    SubmitReply,
    SubmitStatus,
    Write,
    WriteReply,
    WriteStatus,
)
from service.queues.admission import admission_cost, answer_share
from service.queues.memory_entry import Entry, Group, next_lease_end, oldest_age, reached
from service.queues.memory_ledger import Ledger
from service.queues.observer import STOPPED, NullQueueObserver, QueueEvent, QueueObserver

PRIORITIES = 3
TURN = 256
"""Records after which a follower lets others have the event loop."""
ENGINE_SILENCE = 10.0
"""Seconds after which an engine that was not heard of is no longer listed."""

_COUNTED = {
    WriteStatus.DUP: QueueEvent.DUP,
    WriteStatus.GAP: QueueEvent.GAP,
    WriteStatus.FENCED: QueueEvent.FENCED,
}


class MemoryQueue:
    """The contract is `service.queues.Queue`."""

    shared = False

    def __init__(
        self,
        limits: QueueLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
        observer: QueueObserver | None = None,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._observer = NullQueueObserver() if observer is None else observer
        self._entries: dict[str, Entry] = {}
        self._groups: dict[str, Group] = {}
        self._waiting: tuple[dict[str, Entry], ...] = tuple({} for _ in range(PRIORITIES))
        self._running: dict[str, Entry] = {}
        self._queued_tokens = 0
        self._ledger = Ledger(limits, clock=clock)
        self._keys: dict[tuple[str, str], tuple[str, str, float]] = {}  # -> id, fingerprint, until
        self._fading: deque[tuple[float, str]] = deque()  # (forget at, submission), in that order
        self._last_sweep = self._swept_since = clock()
        self._engines: dict[str, tuple[float, EngineInfo]] = {}
        self._claimers: set[asyncio.Event] = set()
        self._stop_hints: set[asyncio.Queue[str]] = set()
        self._closed = False

    async def open(self) -> None:
        """Nothing to check: the store is this object."""

    # --- the API's side -------------------------------------------------------------------
    async def submit(self, submission: Submission) -> SubmitReply:
        self._forget()
        found = self._admitted_before(submission)
        if found is not None:
            return found
        requests = submission.requests
        cost = sum(map(admission_cost, requests))
        status = self._refusal(submission, cost=cost)
        if status is not None:
            return self._reply(status, submission, cost=cost)
        now = self._clock()
        turns = self._ledger.enter(submission, tokens=cost)
        entries = [
            Entry(request, submission.id, now, turn)
            for request, turn in zip(requests, turns, strict=True)
        ]
        self._groups[submission.id] = Group.of(submission, entries, now=now)
        for entry in entries:
            self._entries[entry.request.id] = entry
            self._waiting[entry.request.priority][entry.request.id] = entry
        self._queued_tokens += cost
        if submission.idempotency_key is not None:
            until = now + self.limits.idempotency_ttl
            key = (submission.tenant, submission.idempotency_key)
            self._keys[key] = (submission.id, submission.fingerprint, until)
        self._wake_claimers()
        return self._reply(SubmitStatus.OK, submission)

    def _admitted_before(self, submission: Submission) -> SubmitReply | None:
        if submission.idempotency_key is not None:
            known = self._keys.get((submission.tenant, submission.idempotency_key))
            if known is not None and known[2] > self._clock():
                same = known[1] == submission.fingerprint
                status = SubmitStatus.EXISTS if same else SubmitStatus.CONFLICT
                return self._reply(status, submission, follow=known[0])
        if submission.id in self._groups:
            return self._reply(SubmitStatus.EXISTS, submission)
        return None

    def _refusal(self, submission: Submission, *, cost: int) -> SubmitStatus | None:
        status = self._ledger.refusal(submission, tokens=cost)
        queued = sum(map(len, self._waiting)) + len(submission.requests)
        over = queued > self.limits.max_requests
        if over or self._queued_tokens + cost > self.limits.max_tokens:
            return status or SubmitStatus.FULL
        return status

    def _reply(
        self, status: SubmitStatus, submission: Submission, *, follow: str = "", cost: int = 0
    ) -> SubmitReply:
        return SubmitReply(
            status=status,
            submission_id=follow or submission.id,
            queued_requests=sum(map(len, self._waiting)),
            queued_tokens=self._queued_tokens,
            usage=self._ledger.usage(submission.allowance, tokens=cost),
        )

    async def lookup(self, submission_id: str) -> StoredSubmission | None:
        self._forget()
        group = self._groups.get(submission_id)
        return None if group is None else group.stored

    async def read(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return self._known(request_id).beyond(after)

    async def read_page(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return self._known(request_id).beyond(after, most=PAGE_TOKENS)

    async def follow(self, request_id: str, *, after: int = 0) -> AsyncIterator[Record]:
        entry = self._known(request_id)
        news = asyncio.Event()
        entry.followers.add(news)
        try:
            index = bisect_right(entry.ends, after)
            while True:
                news.clear()
                while index < len(entry.journal):
                    if entry.ends[index] > after:
                        yield entry.journal[index]
                    index += 1
                    if index % TURN == 0:
                        await asyncio.sleep(0)
                if entry.end is not None:
                    yield reached(entry.end, after=after)
                    return
                if self._closed:
                    raise Unavailable("the queue was closed", code="backend_unavailable")
                await news.wait()
        finally:
            entry.followers.discard(news)

    def _known(self, request_id: str) -> Entry:
        self._forget()
        entry = self._entries.get(request_id)
        if entry is None:
            raise NotFound("no such request, or its resume window is over")
        return entry

    async def stop(self, request_ids: Sequence[str], reason: FinishReason) -> None:
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is None or entry.end is not None:
                continue
            if reason is not FinishReason.DEADLINE or self._overdue(entry):
                self._stop(entry, reason)

    async def attend(self, submission_ids: Sequence[str]) -> None:
        now = self._clock()
        for submission_id in submission_ids:
            group = self._groups.get(submission_id)
            if group is not None:
                group.attended = now

    async def forget(self, submission_id: str) -> None:
        group = self._groups.get(submission_id)
        if group is None:
            return
        await self.stop([entry.request.id for entry in group.entries], FinishReason.CANCELLED)
        self._drop(submission_id)

    async def sweep(self) -> int:
        self._forget()
        self._ledger.forget()
        self._note_sweep()
        ended = 0
        for entry in [*self._live()]:
            if self._overdue(entry):
                self._stop(entry, FinishReason.DEADLINE)
            elif self._deserted(self._groups[entry.submission_id]):
                self._stop(entry, FinishReason.CANCELLED)
            else:
                continue
            ended += 1
        return ended

    def _note_sweep(self) -> None:
        now = self._clock()
        if now - self._last_sweep > self.limits.sweep_pause:
            self._swept_since = now
        self._last_sweep = now

    def _deserted(self, group: Group) -> bool:
        if group.grace is None:
            return False
        return self._clock() >= max(group.attended, self._swept_since) + group.grace

    def _live(self) -> Iterator[Entry]:
        yield from self._running.values()
        for waiting in self._waiting:
            yield from waiting.values()

    async def depth(self) -> QueueDepth:
        return QueueDepth(
            queued_requests=sum(map(len, self._waiting)),
            queued_tokens=self._queued_tokens,
            running_requests=len(self._running),
            oldest_seconds=oldest_age(self._waiting, now=self._clock()),
        )

    async def engines(self) -> Sequence[EngineInfo]:
        oldest = self._clock() - ENGINE_SILENCE
        self._engines = {k: seen for k, seen in self._engines.items() if seen[0] >= oldest}
        return [info for _, info in self._engines.values()]

    async def check(self) -> None:
        if self._closed:
            raise Unavailable("the queue was closed", code="backend_unavailable")

    # --- the engine's side ----------------------------------------------------------------
    async def claim(
        self, engine: EngineInfo, *, limit: int, wait: float, newcomers: int = 0
    ) -> Sequence[Claim]:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        news = asyncio.Event()
        self._claimers.add(news)
        try:
            while True:
                await self.check()
                self._engines[engine.id] = (self._clock(), engine)
                claims = self._take(engine, limit, most=limit + newcomers)
                left = until - loop.time()
                if claims or left <= 0:
                    return claims
                news.clear()
                over = next_lease_end(self._running.values(), now=self._clock(), default=left)
                try:
                    async with asyncio.timeout(min(left, over)):
                        await news.wait()
                except TimeoutError:
                    continue
        finally:
            self._claimers.discard(news)

    def _take(self, engine: EngineInfo, limit: int, *, most: int) -> list[Claim]:
        owner = f"{engine.id}:{secrets.token_hex(6)}"
        claims: list[Claim] = []
        for entry in self._candidates():
            if len(claims) >= most:
                break
            if len(claims) >= limit and not self._ledger.is_below_share(entry.request.tenant):
                continue
            if self._overdue(entry):
                self._stop(entry, FinishReason.DEADLINE)
            elif entry.count and entry.numeric_class != engine.numeric_class:
                continue
            elif self._gave_up(entry, engine):
                error = End(count=entry.count, reason=FinishReason.ERROR, error="engine_crash_loop")
                self._end(entry, error)
                self._observer.happened(QueueEvent.CRASHED)
            else:
                claims.append(self._start(entry, engine, owner=owner))
        return claims

    def _candidates(self) -> list[Entry]:
        """Those to be claimed: by priority, then those that ran already, then by their turn."""
        now = self._clock()
        orphans = [e for e in self._running.values() if not e.owner or e.lease_until <= now]
        found: list[Entry] = []
        for priority, waiting in enumerate(self._waiting):
            found += [entry for entry in orphans if entry.request.priority == priority]
            found += sorted(waiting.values(), key=lambda entry: entry.turn)
        return found

    def _gave_up(self, entry: Entry, engine: EngineInfo) -> bool:
        """Counts the death of the engine that still owns a request whose lease is over.

        One that takes its own request back was late, not dead.
        """
        if not entry.owner or entry.owner.startswith(f"{engine.id}:"):
            return False
        entry.deaths += 1
        entry.owner = ""  # counted once
        return entry.deaths >= self.limits.max_attempts

    def _start(self, entry: Entry, engine: EngineInfo, *, owner: str) -> Claim:
        request, waited_ms = entry.request, None
        if entry.started:
            self._observer.happened(QueueEvent.RECLAIMED)
        else:
            del self._waiting[request.priority][request.id]
            self._running[request.id] = entry
            self._queued_tokens -= admission_cost(request)
            entry.started = True
            self._ledger.begin(request.tenant, turn=entry.turn)
        now = self._clock()
        if not entry.epoch:
            waited_ms = round((now - entry.submitted) * 1000)
        entry.epoch += 1
        entry.owner = owner
        entry.numeric_class = engine.numeric_class
        entry.lease_until = now + self.limits.lease
        deadline = entry.deadline
        return Claim(
            lease=Lease(request.id, entry.epoch, owner),
            request=request,
            tokens=tuple(token for record in entry.journal for token in record.ids),
            attempt=entry.deaths + 1,
            remaining_ms=None if deadline is None else max(0, round((deadline - now) * 1000)),
            waited_ms=waited_ms,
        )

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        replies = [self._write(write.lease, write.record) for write in writes]
        for reply in replies:
            if reply.status in _COUNTED:
                self._observer.happened(_COUNTED[reply.status])
        return replies

    def _write(self, lease: Lease, record: Record) -> WriteReply:
        entry = self._entries.get(lease.request_id)
        if entry is None:
            return WriteReply(WriteStatus.FENCED, 0)
        if not entry.holds(lease):
            return WriteReply(WriteStatus.FENCED, entry.count)
        if isinstance(record, End):
            return WriteReply(self._finish(entry, record), entry.count)
        return WriteReply(self._append(entry, record), entry.count)

    def _append(self, entry: Entry, record: Tokens) -> WriteStatus:
        if entry.count >= record.end:
            return WriteStatus.DUP
        if entry.end is not None:
            return WriteStatus.FENCED
        if entry.count != record.start:
            return WriteStatus.GAP
        entry.journal.append(record)
        entry.ends.append(record.end)
        entry.wake()
        return WriteStatus.OK

    def _finish(self, entry: Entry, record: End) -> WriteStatus:
        if entry.end is not None:
            return WriteStatus.DUP if entry.end == record else WriteStatus.FENCED
        if entry.count != record.count:
            return WriteStatus.GAP
        self._end(entry, record)
        return WriteStatus.OK

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        until = self._clock() + self.limits.lease
        lost: list[str] = []
        for lease in leases:
            entry = self._running.get(lease.request_id)
            if entry is not None and entry.holds(lease):
                entry.lease_until = until
            else:
                lost.append(lease.request_id)
        return lost

    async def release(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            entry = self._running.get(lease.request_id)
            if entry is not None and entry.holds(lease):
                entry.owner = ""
        self._wake_claimers()

    async def stops(self) -> AsyncIterator[str]:
        hints: asyncio.Queue[str] = asyncio.Queue()
        self._stop_hints.add(hints)
        try:
            while True:
                yield await hints.get()
        finally:
            self._stop_hints.discard(hints)

    async def close(self) -> None:
        self._closed = True
        self._wake_claimers()
        for entry in self._entries.values():
            entry.wake()

    # --- the edges of the state machine ---------------------------------------------------
    def _overdue(self, entry: Entry) -> bool:
        """Past its deadline or, where it has none, left without an engine for `live_ttl`."""
        deadline = entry.deadline
        if deadline is None:
            alone_since = entry.lease_until if entry.started else entry.submitted
            deadline = alone_since + self.limits.live_ttl
        return self._clock() >= deadline

    def _stop(self, entry: Entry, reason: FinishReason) -> None:
        if entry.owner:
            for hints in self._stop_hints:
                hints.put_nowait(entry.request.id)
        entry.epoch += 1
        entry.owner = ""
        self._end(entry, End(count=entry.count, reason=reason))
        self._observer.happened(STOPPED[reason])

    def _end(self, entry: Entry, end: End) -> None:
        request = entry.request
        if entry.started:
            del self._running[request.id]
        else:
            del self._waiting[request.priority][request.id]
            self._queued_tokens -= admission_cost(request)
        entry.end = end
        group = self._groups[entry.submission_id]
        beyond = entry.count - answer_share(request)
        self._ledger.leave(group.stored.tenant, group.allowance, tokens=beyond, ran=entry.started)
        group.unfinished -= 1
        if not group.unfinished:
            self._fading.append((self._clock() + self.limits.resume_window, entry.submission_id))
        entry.wake()

    def _forget(self) -> None:
        now = self._clock()
        while self._fading and self._fading[0][0] <= now:
            self._drop(self._fading.popleft()[1])
        while self._keys:
            oldest = next(iter(self._keys))
            if self._keys[oldest][2] > now:
                break
            del self._keys[oldest]

    def _drop(self, submission_id: str) -> None:
        group = self._groups.pop(submission_id, None)
        for entry in group.entries if group else ():
            del self._entries[entry.request.id]

    def _wake_claimers(self) -> None:
        for news in self._claimers:
            news.set()
