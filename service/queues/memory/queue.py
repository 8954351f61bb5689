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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from service.errors import NotFound, Unavailable
from service.messages import Allowance, End, FinishReason, Record, Submission, Tokens
from service.queues.admission import Usage, admission_cost, answer_share
from service.queues.contract import (
    BLAME_KEPT,
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
from service.queues.memory.blame import Blame
from service.queues.memory.entry import Entry, Group, next_lease_end, oldest_age, reached
from service.queues.memory.ledger import Ledger
from service.queues.memory.shelf import Shelf
from service.queues.observer import STOPPED, NullQueueObserver, QueueEvent, QueueObserver

PRIORITIES = 3
TURN = 256
"""Records after which a follower lets others have the event loop."""
ENGINE_SILENCE = 10.0
"""Seconds after which an engine that was not heard of is no longer listed."""

CRASH_LOOP = "engine_crash_loop"

_COUNTED = {
    WriteStatus.DUP: QueueEvent.DUP,
    WriteStatus.GAP: QueueEvent.GAP,
    WriteStatus.FENCED: QueueEvent.FENCED,
}


class MemoryQueue:
    """The contract is `service.queues.contract.Queue`."""

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
        self._shelf = Shelf(limits, clock=clock)
        self._entries, self._groups = self._shelf.entries, self._shelf.groups
        self._waiting: tuple[dict[str, Entry], ...] = tuple({} for _ in range(PRIORITIES))
        self._running: dict[str, Entry] = {}
        self._queued_tokens = 0
        self._ledger = Ledger(limits, clock=clock)
        self._last_sweep = self._swept_since = clock()
        self._engines: dict[str, tuple[float, EngineInfo]] = {}
        self._blame = Blame(limits, clock=clock, engines=self._engines, freed=self._wake_claimers)
        self._claimers: set[asyncio.Event] = set()
        self._stop_hints: set[asyncio.Queue[str]] = set()
        self._closed = False

    async def open(self) -> None:
        """Nothing to check: the store is this object."""

    # --- the API's side -------------------------------------------------------------------
    async def charge(self, allowance: Allowance) -> Usage:
        await self.check()
        return self._ledger.charge(allowance)

    async def submit(self, submission: Submission) -> SubmitReply:
        self._shelf.forget()
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
        self._shelf.put(submission, entries, now=now)
        for entry in entries:
            self._waiting[entry.request.priority][entry.request.id] = entry
        self._queued_tokens += cost
        self._wake_claimers()
        return self._reply(SubmitStatus.OK, submission)

    def _admitted_before(self, submission: Submission) -> SubmitReply | None:
        earlier = self._shelf.earlier(submission)
        if earlier is not None:
            same = earlier[1] == submission.fingerprint
            status = SubmitStatus.EXISTS if same else SubmitStatus.CONFLICT
            return self._reply(status, submission, follow=earlier[0])
        if submission.id in self._groups:
            return self._reply(SubmitStatus.EXISTS, submission)
        return None

    def _refusal(self, submission: Submission, *, cost: int) -> SubmitStatus | None:
        """Whatever is the tenant's own fault comes first."""
        own = self._ledger.refusal(submission, tokens=cost)
        storage = self._shelf.refusal(submission)
        if own is not None or storage is SubmitStatus.TENANT_STORAGE:
            return own or storage
        queued = sum(map(len, self._waiting)) + len(submission.requests)
        over = queued > self.limits.max_requests
        if over or self._queued_tokens + cost > self.limits.max_tokens:
            return SubmitStatus.FULL
        return storage

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
        self._shelf.forget()
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
        self._shelf.forget()
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

    async def heartbeat(self, submission_ids: Sequence[str]) -> None:
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
        self._shelf.drop(submission_id)

    async def sweep(self) -> int:
        self._shelf.forget()
        self._ledger.forget()
        self._blame.forget(BLAME_KEPT)
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
            stored_bytes=self._shelf.stored_bytes,
            oldest_seconds=oldest_age(self._waiting, now=self._clock()),
        )

    async def engines(self) -> Sequence[EngineInfo]:
        oldest = self._clock() - ENGINE_SILENCE
        for engine in [k for k, seen in self._engines.items() if seen[0] < oldest]:
            del self._engines[engine]
        return [info for _, info in self._engines.values()]

    async def check(self) -> None:
        if self._closed:
            raise Unavailable("the queue was closed", code="backend_unavailable")

    # --- the engine's side ----------------------------------------------------------------
    async def claim(
        self, engine: EngineInfo, *, limit: int, wait: float, under_served: int = 0
    ) -> Sequence[Claim]:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        news = asyncio.Event()
        self._claimers.add(news)
        try:
            while True:
                await self.check()
                self._engines[engine.id] = (self._clock(), engine)
                self._blame.heard(engine.id)
                claims = self._take(engine, limit, most=limit + under_served)
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
        orphans = self._orphans(engine) if limit > 0 else []
        for entry in self._blame.next_group(engine, limit=limit):
            self._blame.isolate(entry, engine)
            claims.append(self._start(entry, engine, owner=owner))
        for entry in self._candidates(orphans):
            if len(claims) >= most:
                break
            if len(claims) >= limit and not self._ledger.is_below_share(entry.request.tenant):
                continue
            if self._overdue(entry):
                self._stop(entry, FinishReason.DEADLINE)
            elif entry.may_run(engine):
                claims.append(self._start(entry, engine, owner=owner))
        return claims

    def _orphans(self, engine: EngineInfo) -> list[Entry]:
        """Those that ran already and need no isolation. Finds out why their leases are over."""
        found: list[Entry] = []
        for entry in [*self._running.values()]:
            if entry.owner and entry.lease_until > self._clock():
                continue
            settled: bool | None = True
            if entry.owner and not self._overdue(entry) and entry.may_run(engine):
                settled = self._blame.settle(entry, engine)
                if settled is False:
                    self._fail(entry)
                elif settled and entry.blamers:
                    self._blame.leave(entry)
                    entry.owner = ""
            if settled and not entry.blamers:
                found.append(entry)
        return found

    def _fail(self, entry: Entry) -> None:
        entry.epoch += 1
        entry.owner = ""
        self._end(entry, End(count=entry.count, reason=FinishReason.ERROR, error=CRASH_LOOP))
        self._observer.happened(QueueEvent.CRASHED)

    def _candidates(self, orphans: Sequence[Entry]) -> list[Entry]:
        """Those to be claimed: by priority, then those that ran already, then by their turn."""
        found: list[Entry] = []
        for priority, waiting in enumerate(self._waiting):
            found += [entry for entry in orphans if entry.request.priority == priority]
            found += sorted(waiting.values(), key=lambda entry: entry.turn)
        return found

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
        return entry.claim(now=now, waited_ms=waited_ms)

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
        status = entry.append(record)
        if status is WriteStatus.OK:
            self._blame.progressed(entry)
        return status

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
        for engine in {lease.engine for lease in leases} & self._engines.keys():
            self._engines[engine] = (self._clock(), self._engines[engine][1])
            self._blame.heard(engine)
        for lease in leases:
            entry = self._running.get(lease.request_id)
            if entry is not None and entry.holds(lease):
                entry.lease_until = until
            else:
                lost.append(lease.request_id)
        return lost

    async def release(self, leases: Sequence[Lease], *, died: bool = False) -> None:
        for lease in leases:
            entry = self._running.get(lease.request_id)
            if entry is None or not entry.holds(lease):
                continue
            if died and self._blame.died(entry):
                self._fail(entry)
            else:
                self._blame.leave(entry)
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
        self._blame.ended(entry)
        group = self._groups[entry.submission_id]
        beyond = entry.count - answer_share(request)
        self._ledger.leave(group.stored.tenant, group.allowance, tokens=beyond, ran=entry.started)
        self._shelf.ended(entry)
        entry.wake()

    def _wake_claimers(self) -> None:
        for news in self._claimers:
            news.set()
