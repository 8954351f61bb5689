"""MemoryQueue: the queue in one asyncio process, for the embedded default and tests.

It behaves like the Redis queue, but keeps nothing beyond the life of the process. All methods run
on one event loop; no thread may call them. The cost of reading depends on the new records only:
followers hold an index into the journal and are woken, they never poll.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence

from service.errors import NotFound, Unavailable
from service.messages import Allowance, End, FinishReason, Record, Submission
from service.queues.admission import RateUsage, submission_cost
from service.queues.contract import (
    BLAME_KEPT,
    ENGINE_SILENCE,
    PAGE_TOKENS,
    Claim,
    EngineGroup,
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
from service.queues.memory.state_machine import StateMachine
from service.queues.memory.submissions import Entry, Group, checked_end
from service.queues.observer import QueueObserver, report_replies
from service.queues.usage import Usage, decode_usage, sum_usage
from service.queues.waiting import woken_within

BURST = 256
"""Records after which a follower yields to the event loop."""
LOOK_AGAIN = 0.05
"""Seconds until a waiting claim looks again at a request whose lease is over."""


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
        self._observer = QueueObserver() if observer is None else observer
        self._machine = StateMachine(
            limits,
            clock=clock,
            observer=self._observer,
            work_came=self._wake_claimers,
            stopped=self._hint,
        )
        self._submissions = self._machine.submissions
        self._entries, self._groups = self._submissions.entries, self._submissions.groups
        self._running = self._machine.running
        self._last_sweep = self._swept_since = clock()
        self._leases: dict[str, tuple[str, float]] = {}  # name -> owner, end
        self._claimers: set[asyncio.Event] = set()
        self._stop_hints: set[asyncio.Queue[str]] = set()
        self._closed = False

    async def open(self) -> None:
        """Nothing to check: the store is this object."""

    # --- the API's side -------------------------------------------------------------------
    async def charge(self, allowance: Allowance) -> RateUsage:
        await self.check()
        return self._machine.tenants.charge(allowance)

    async def submit(self, submission: Submission) -> SubmitReply:
        self._submissions.expire()
        earlier = self._submissions.earlier(submission)
        if earlier is not None:
            same = earlier[1] == submission.fingerprint
            status = SubmitStatus.EXISTS if same else SubmitStatus.CONFLICT
            return self._reply(status, submission, follow=earlier[0])
        if submission.id in self._groups:
            return self._reply(SubmitStatus.EXISTS, submission)
        cost = submission_cost(submission)
        refusal = self._machine.refusal(submission, cost=cost)
        if refusal is not None:
            return self._reply(refusal, submission, cost=cost)
        self._machine.admit(submission, cost=cost)
        return self._reply(SubmitStatus.OK, submission)

    def _reply(
        self, status: SubmitStatus, submission: Submission, *, follow: str = "", cost: int = 0
    ) -> SubmitReply:
        return SubmitReply(
            status=status,
            submission_id=follow or submission.id,
            queued_requests=self._machine.num_waiting,
            queued_tokens=self._machine.queued_tokens,
            usage=self._machine.tenants.usage(submission.allowance, tokens=cost),
        )

    async def lookup(self, submission_id: str) -> StoredSubmission | None:
        self._submissions.expire()
        group = self._groups.get(submission_id)
        return None if group is None else group.stored

    async def read_input(self, submission_id: str) -> str | None:
        self._submissions.expire()
        group = self._groups.get(submission_id)
        return group.submission.input if group is not None and group.is_kept else None

    async def touch(self, submission_ids: Sequence[str]) -> None:
        for submission_id in submission_ids:
            group = self._groups.get(submission_id)
            if group is not None and group.is_kept and not group.unfinished:
                self._submissions.keep(group)

    async def read(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return self._known(request_id).beyond(after)

    async def read_page(self, request_id: str, *, after: int = 0) -> Sequence[Record]:
        return self._known(request_id).beyond(after, most=PAGE_TOKENS)

    async def follow(self, request_id: str, *, after: int = 0) -> AsyncIterator[Record]:
        entry = self._known(request_id)
        news = asyncio.Event()
        entry.followers.add(news)
        try:
            index = entry.index_after(after)
            while True:
                news.clear()
                while index < len(entry.journal):
                    if entry.journal[index].end > after:  # the reader may be ahead of the journal
                        yield entry.journal[index]
                    index += 1
                    if index % BURST == 0:
                        await asyncio.sleep(0)
                if entry.end is not None:
                    yield checked_end(entry.end, after=after)
                    return
                if self._closed:
                    raise Unavailable("the queue was closed", code="backend_unavailable")
                await news.wait()
        finally:
            entry.followers.discard(news)

    def _known(self, request_id: str) -> Entry:
        self._submissions.expire()
        entry = self._entries.get(request_id)
        if entry is None:
            raise NotFound("no such request, or its resume window is over")
        return entry

    async def stop(self, request_ids: Sequence[str], reason: FinishReason) -> None:
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is None or entry.end is not None:
                continue
            if reason is not FinishReason.DEADLINE or self._machine.is_overdue(entry):
                self._machine.stop(entry, reason)

    async def heartbeat(self, submission_ids: Sequence[str]) -> None:
        now = self._clock()
        for submission_id in submission_ids:
            group = self._groups.get(submission_id)
            if group is not None:
                group.heartbeat = now

    async def forget(self, submission_id: str) -> None:
        group = self._groups.get(submission_id)
        if group is None:
            return
        await self.stop([entry.request.id for entry in group.entries], FinishReason.CANCELLED)
        self._submissions.drop(submission_id)

    async def sweep(self) -> int:
        self._submissions.expire()
        self._machine.tenants.expire()
        self._machine.blame.expire(BLAME_KEPT)
        now = self._clock()
        if now - self._last_sweep > self.limits.sweep_pause:
            self._swept_since = now
        self._last_sweep = now
        ended = 0
        for entry in [*self._machine.live()]:
            if self._machine.is_overdue(entry):
                self._machine.stop(entry, FinishReason.DEADLINE)
            elif self._is_abandoned(self._groups[entry.submission_id]):
                self._machine.stop(entry, FinishReason.CANCELLED)
            else:
                continue
            ended += 1
        return ended

    def _is_abandoned(self, group: Group) -> bool:
        grace = group.submission.grace
        if grace is None:
            return False
        return self._clock() >= max(group.heartbeat, self._swept_since) + grace

    async def take_lease(self, name: str, owner: str, *, seconds: float) -> bool:
        now = self._clock()
        self._leases = {each: lease for each, lease in self._leases.items() if lease[1] > now}
        if self._leases.setdefault(name, (owner, now))[0] != owner:
            return False
        self._leases[name] = owner, now + seconds
        return True

    async def drop_lease(self, name: str, owner: str) -> None:
        if self._leases.get(name, ("", 0.0))[0] == owner:
            del self._leases[name]

    async def usage(self, days: Sequence[int]) -> Sequence[Usage]:
        counts = self._machine.usage
        return sum_usage(decode_usage(day, counts.get(day, {})) for day in days)

    async def depth(self) -> QueueDepth:
        return QueueDepth(
            queued_requests=self._machine.num_waiting,
            queued_tokens=self._machine.queued_tokens,
            running_requests=len(self._running),
            stored_bytes=self._submissions.stored_bytes,
            oldest_seconds=self._machine.oldest_seconds(),
            by_model=self._machine.by_model(),
        )

    async def engines(self) -> Sequence[EngineInfo]:
        engines, oldest = self._machine.engines, self._clock() - ENGINE_SILENCE
        for engine in [k for k, seen in engines.items() if seen[0] < oldest]:
            del engines[engine]
        return [info for _, info in engines.values()]

    async def engine_groups(self) -> Sequence[EngineGroup]:
        groups: dict[EngineInfo, list[EngineInfo]] = {}
        for info in await self.engines():
            groups.setdefault(info.without_load(), []).append(info)
        return [
            EngineGroup(
                common,
                engines=len(members),
                tokens_per_second=sum(info.tokens_per_second for info in members),
            )
            for common, members in groups.items()
        ]

    async def check(self) -> None:
        if self._closed:
            raise Unavailable("the queue was closed", code="backend_unavailable")

    # --- the engine's side ----------------------------------------------------------------
    async def hold(self, engine: str, prefixes: Collection[str]) -> None:
        self._machine.affinity.hold(engine, prefixes)

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
                self._machine.heartbeat(engine.id, engine)
                claims = self._machine.claim(engine, limit=limit, most=limit + under_served)
                free_in = self._machine.free_in
                left = until - loop.time()
                if claims or left <= 0:
                    return claims
                news.clear()
                await woken_within(min(left, self._next_lease_end(), free_in), news)
        finally:
            self._claimers.discard(news)

    def _next_lease_end(self) -> float:
        """Seconds until another running request may be claimed again."""
        now = self._clock()
        left = (entry.lease_until - now for entry in self._running.values())
        return max(LOOK_AGAIN, min(left, default=float("inf")))

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        replies = [self._write(write.lease, write.record) for write in writes]
        report_replies(replies, self._observer)
        return replies

    def _write(self, lease: Lease, record: Record) -> WriteReply:
        entry = self._entries.get(lease.request_id)
        if entry is None:
            return WriteReply(WriteStatus.FENCED, 0)
        if not entry.holds(lease):
            return WriteReply(WriteStatus.FENCED, entry.count)
        if isinstance(record, End):
            return WriteReply(self._machine.finish(entry, record), entry.count)
        status = entry.append(record)
        if status is WriteStatus.OK:
            self._machine.blame.progressed(entry)
        return WriteReply(status, entry.count)

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        until = self._clock() + self.limits.lease
        for engine in {lease.engine for lease in leases}:
            self._machine.heartbeat(engine)
        lost: list[str] = []
        for lease in leases:
            entry = self._machine.leased(lease)
            if entry is None:
                lost.append(lease.request_id)
            else:
                entry.lease_until = until
        return lost

    async def release(self, leases: Sequence[Lease], *, died: bool = False) -> None:
        for lease in leases:
            entry = self._machine.leased(lease)
            if entry is not None:
                self._machine.release(entry, died=died)
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

    def _hint(self, request_id: str) -> None:
        for hints in self._stop_hints:
            hints.put_nowait(request_id)

    def _wake_claimers(self) -> None:
        for news in self._claimers:
            news.set()
