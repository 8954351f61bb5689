"""StateMachine: the transitions of the requests that the queue in memory holds.

It waits for nothing and calls back instead: `work_came` if an engine may claim something now,
`stopped` with a running request that was stopped.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from service.messages import End, FinishReason, Submission
from service.queues.admission import admission_cost, answer_share
from service.queues.contract import (
    CRASH_LOOP,
    Claim,
    EngineInfo,
    Lease,
    ModelDepth,
    QueueLimits,
    SubmitStatus,
    WriteStatus,
)
from service.queues.memory.affinity import Affinity
from service.queues.memory.blame import Blame
from service.queues.memory.submissions import Entry, Submissions
from service.queues.memory.tenants import Tenants
from service.queues.observer import STOPPED, QueueEvent, QueueObserver
from service.queues.usage import DAY, USAGE_KEPT, account_of, counted_prompt, counts_output

PRIORITIES = 3


class StateMachine:
    """`engines`: id -> (last heartbeat, report). Times are from the queue's clock, in seconds."""

    def __init__(
        self,
        limits: QueueLimits,
        *,
        clock: Callable[[], float],
        observer: QueueObserver,
        work_came: Callable[[], None],
        stopped: Callable[[str], None],
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._observer = observer
        self._work_came = work_came
        self._stopped = stopped
        self.submissions = Submissions(limits, clock=clock)
        self.tenants = Tenants(limits, clock=clock)
        self.engines: dict[str, tuple[float, EngineInfo]] = {}
        self.blame = Blame(limits, clock=clock, engines=self.engines, freed=work_came)
        self.affinity = Affinity(clock=clock, engines=self.engines)
        self.waiting: tuple[dict[str, Entry], ...] = tuple({} for _ in range(PRIORITIES))
        self.running: dict[str, Entry] = {}
        self.queued_tokens = 0
        self.usage: dict[int, Counter[str]] = {}  # day -> see `decode_usage`
        self.free_in = float("inf")  # seconds until what the last claim left to others is free

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.waiting))

    def live(self) -> Iterator[Entry]:
        """Requests that have not ended."""
        waiting = (entries.values() for entries in self.waiting)
        return chain(self.running.values(), *waiting)

    def oldest_seconds(self) -> float | None:
        """Age of the oldest queued request: the first of its priority."""
        first = (next(iter(entries.values())) for entries in self.waiting if entries)
        return max((self._clock() - entry.submitted for entry in first), default=None)

    def by_model(self) -> dict[str, ModelDepth]:
        """Queued and running requests by the key of their model."""
        queued, tokens, running = Counter[str](), Counter[str](), Counter[str]()
        for entry in self.live():
            model = entry.request.model
            if entry.started:
                running[model] += 1
            else:
                queued[model] += 1
                tokens[model] += admission_cost(entry.request)
        return {
            model: ModelDepth(
                queued_requests=queued[model],
                queued_tokens=tokens[model],
                running_requests=running[model],
            )
            for model in queued | running
        }

    def refusal(self, submission: Submission, *, cost: int) -> SubmitStatus | None:
        """The tenant's own limits come before those of all."""
        own = self.tenants.refusal(submission, tokens=cost)
        if own is not None:
            return own
        if not self.submissions.tenant_has_room(submission):
            return SubmitStatus.TENANT_STORAGE
        over = self.num_waiting + len(submission.requests) > self._limits.max_requests
        if over or self.queued_tokens + cost > self._limits.max_tokens:
            return SubmitStatus.FULL
        return None if self.submissions.has_room(submission) else SubmitStatus.STORAGE

    def admit(self, submission: Submission, *, cost: int) -> None:
        """(none) -> QUEUED"""
        now = self._clock()
        turns = self.tenants.enter(submission, tokens=cost)
        entries = [
            Entry(request, submission.id, now, turn)
            for request, turn in zip(submission.requests, turns, strict=True)
        ]
        self.submissions.put(submission, entries, now=now)
        for entry in entries:
            self.waiting[entry.request.priority][entry.request.id] = entry
        for entry, prefixes in zip(entries, submission.prefixes, strict=False):
            self.affinity.reserve(entry.request.id, prefixes)
        self.queued_tokens += cost
        self._work_came()

    def heartbeat(self, engine: str, report: EngineInfo | None = None) -> None:
        """Notes that an engine is alive, with its report if it sent one."""
        if report is None and engine in self.engines:
            report = self.engines[engine][1]
        if report is not None:
            self.engines[engine] = (self._clock(), report)
            self.blame.heard(engine)

    def claim(self, engine: EngineInfo, *, limit: int, most: int) -> list[Claim]:
        """QUEUED or RUNNING -> RUNNING. `most`: with those of under-served tenants."""
        owner = f"{engine.id}:{secrets.token_hex(6)}"
        self.free_in = float("inf")
        claims: list[Claim] = []
        orphans = self._orphans(engine) if limit > 0 else []
        for entry in self.blame.next_group(engine, limit=limit):
            self.blame.isolate(entry, engine)
            claims.append(self._start(entry, engine, owner=owner))
        for entry in self._candidates(orphans):
            if len(claims) >= most:
                break
            if len(claims) >= limit and not self.tenants.is_below_share(entry.request.tenant):
                continue
            if self.is_overdue(entry):
                self.stop(entry, FinishReason.DEADLINE)
            elif entry.may_run(engine) and self._is_free(entry, engine):
                claims.append(self._start(entry, engine, owner=owner))
        return claims

    def _is_free(self, entry: Entry, engine: EngineInfo) -> bool:
        """Whether it is not left to engines that hold its prefix."""
        left = self.affinity.left_for(entry.request.id, engine)
        if left is not None:
            self.free_in = min(self.free_in, left)
        return left is None

    def _orphans(self, engine: EngineInfo) -> list[Entry]:
        """Those that ran already and need no isolation; finds out why their leases are over."""
        found: list[Entry] = []
        for entry in [*self.running.values()]:
            if entry.owner and entry.lease_until > self._clock():
                continue
            settled: bool | None = True
            if entry.owner and not self.is_overdue(entry) and entry.may_run(engine):
                settled = self.blame.settle(entry, engine)
                if settled is False:
                    self._fail(entry)
                elif settled and entry.blamers:
                    self._release(entry)
            if settled and not entry.blamers:
                found.append(entry)
        return found

    def _candidates(self, orphans: Sequence[Entry]) -> list[Entry]:
        """What may be claimed: by priority, then those that ran already, then by their turn."""
        found: list[Entry] = []
        for priority, waiting in enumerate(self.waiting):
            found += [entry for entry in orphans if entry.request.priority == priority]
            found += sorted(waiting.values(), key=lambda entry: entry.turn)
        return found

    def _start(self, entry: Entry, engine: EngineInfo, *, owner: str) -> Claim:
        request, now = entry.request, self._clock()
        if entry.started:
            self._observer.happened(QueueEvent.RECLAIMED)
        else:
            self._leave_queue(entry)
            self.running[request.id] = entry
            entry.started = True
            self.tenants.begin(request.tenant, turn=entry.turn)
        waited_ms = None if entry.epoch else round((now - entry.submitted) * 1000)
        entry.epoch += 1
        entry.owner = owner
        entry.numeric_class = engine.numeric_class
        entry.lease_until = now + self._limits.lease
        return entry.claim(now=now, waited_ms=waited_ms)

    def leased(self, lease: Lease) -> Entry | None:
        """The running request of a lease; None if the lease is lost."""
        entry = self.running.get(lease.request_id)
        return entry if entry is not None and entry.holds(lease) else None

    def release(self, entry: Entry, *, died: bool) -> None:
        """RUNNING, without an engine; or -> ERROR if the engine died and that fails it."""
        if died and self.blame.died(entry):
            self._fail(entry)
        else:
            self._release(entry)

    def _release(self, entry: Entry) -> None:
        self.blame.released(entry)
        entry.owner = ""

    def finish(self, entry: Entry, end: End) -> WriteStatus:
        """RUNNING -> DONE"""
        if entry.end is not None:
            return WriteStatus.DUP if entry.end == end else WriteStatus.FENCED
        if entry.count != end.count:
            return WriteStatus.GAP
        self._end(entry, end)
        return WriteStatus.OK

    def is_overdue(self, entry: Entry) -> bool:
        """Past its deadline or, if it has none, left without an engine for `live_ttl`."""
        deadline = entry.deadline
        if deadline is None:
            alone_since = entry.lease_until if entry.started else entry.submitted
            deadline = alone_since + self._limits.live_ttl
        return self._clock() >= deadline

    def stop(self, entry: Entry, reason: FinishReason) -> None:
        """QUEUED or RUNNING -> CANCELLED or DEADLINE"""
        if entry.owner:
            self._stopped(entry.request.id)
        self._end_without_engine(entry, End(count=entry.count, reason=reason))
        self._observer.happened(STOPPED[reason])

    def _fail(self, entry: Entry) -> None:
        end = End(count=entry.count, reason=FinishReason.ERROR, error=CRASH_LOOP)
        self._end_without_engine(entry, end)
        self._observer.happened(QueueEvent.CRASHED)

    def _end_without_engine(self, entry: Entry, end: End) -> None:
        """The new epoch fences the engine off."""
        entry.epoch += 1
        entry.owner = ""
        self._end(entry, end)

    def _end(self, entry: Entry, end: End) -> None:
        if entry.started:
            del self.running[entry.request.id]
        else:
            self._leave_queue(entry)
        entry.end = end
        self.blame.discard(entry)
        submission = self.submissions.groups[entry.submission_id].submission
        beyond = entry.count - answer_share(entry.request)
        self.tenants.leave(submission, tokens=beyond, ran=entry.started)
        self._count_usage(entry, end, submission)
        self.submissions.ended(entry)
        entry.wake()

    def _count_usage(self, entry: Entry, end: End, submission: Submission) -> None:
        if not entry.started:
            return
        prompt, account = counted_prompt(entry.request), account_of(submission)
        cached = end.cached_tokens if prompt else 0
        generated = entry.count if counts_output(entry.request) else 0
        today = int(time.time()) // DAY
        if today not in self.usage:
            self.usage = {d: c for d, c in self.usage.items() if d > today - USAGE_KEPT}
            self.usage[today] = Counter()
        used = {"n": 1, "p": prompt, "c": cached, "g": generated}
        self.usage[today].update({f"{kind} {account}": n for kind, n in used.items()})

    def _leave_queue(self, entry: Entry) -> None:
        del self.waiting[entry.request.priority][entry.request.id]
        self.affinity.discard(entry.request.id)
        self.queued_tokens -= admission_cost(entry.request)
