"""Worker: between the queue and the engine. Claims, hands in, journals, renews, releases.

It runs in an event loop; the engine computes in a thread of its own, so a long step delays neither
a renewal nor a write. If a step does not end at all, the worker neither claims nor renews and gives
the requests up, so that other engines take them over. It knows neither HTTP nor tensors.

    claim loop   queue.claim -> LeasedWork -> engine.add    only what the engine has room for
    write loop   engine events -> queue.write          one round trip for all that came meanwhile
    renew loop   queue.renew each third of a lease     what is lost is aborted
    stop loop    queue.stops -> engine.abort           a hint that saves up to a third of a lease

Every call of the queue may raise `Unavailable`. Claims, writes, renewals and the stop hints are
repeated until they succeed or the lease is over; a release is repeated with the next renewal.

The queue decides which requests run isolated, because engines died on them (`service.queues`). The
worker keeps what it needs for that: while a request is isolated, each of its tokens is journalled
before the next step computes, so that the journal shows where an engine died; while it has its last
attempt, nothing else is claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from service.engine.loop import EngineLoop, Work
from service.errors import Unavailable
from service.fair_pool import FairPool
from service.messages import End, Event, FinishReason, Tokens
from service.queues.contract import Claim, EngineInfo, Lease, Queue, Write, WriteReply, WriteStatus
from service.worker.leased_work import LeasedWork
from service.worker.observer import WorkerObserver

log = logging.getLogger("quire.worker")

CLAIM_WAIT = 0.25  # seconds; a drain waits for the claim under way
HEARTBEAT = 1.0  # seconds at most between two heartbeats; a third of a lease if that is less
GIVE_BACK_WITHIN = 3.0  # seconds; if the store is away for longer, the leases run out
PREPARING_THREADS = 2  # for grammars, tenants in turns
STORAGE_PATIENCE = 5.0  # seconds for which a write is retried while the store refuses it
LOOKS_AT_STALL = 2  # a third of a lease apart; a process that was frozen as a whole sees one
SETTLE_WITHIN = 1.0  # seconds that a step waits for the journal while requests are isolated


class EngineFailure(Exception):
    """The runner broke. The process must end: nothing that it computes can be trusted."""


class Worker:
    """Serves one queue with one engine until `drain` or a broken runner.

    `run` raises EngineFailure when the engine breaks. `drain` gives every lease back at once, so
    that other engines go on with the requests where their journals end.
    """

    def __init__(
        self,
        queue: Queue,
        engine: EngineLoop,
        *,
        info: Callable[[], EngineInfo],
        observer: WorkerObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._engine = engine
        self._info = info
        self._observer = observer
        self._clock = clock
        self._held: dict[str, LeasedWork] = {}
        self._events: deque[Event] = deque()
        self._events_came = asyncio.Event()
        self._writing = asyncio.Lock()
        self._room_changed = asyncio.Event()
        self._preparing = FairPool("grammar preparation", threads=PREPARING_THREADS)
        self._compiling: set[asyncio.Task[None]] = set()  # claims whose grammar is not ready yet
        self._isolated: set[str] = set()
        self._delivered = self._taken = self._journalled = 0  # steps whose events got so far
        self._progress = threading.Condition()  # of `_journalled`
        self._draining = asyncio.Event()
        self._failed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._renewed = clock()
        self._unreleased: list[Lease] = []  # to be released when the store answers
        self._given_up: set[str] = set()  # requests that a stalled engine still has

    # --- called from the engine thread ----------------------------------------------------
    def deliver(self, events: Sequence[Event]) -> None:
        """Takes the events of one step. The engine's thread."""
        if self._loop is not None:
            self._delivered += 1
            self._loop.call_soon_threadsafe(self._take, events, self._delivered)

    def settle(self) -> None:
        """Waits, if requests are isolated, until what was delivered is in the journal. The engine's
        thread, before it computes a step.
        """
        if self._isolated:
            with self._progress:
                self._progress.wait_for(
                    lambda: self._journalled >= self._delivered or not self._isolated,
                    SETTLE_WITHIN,
                )

    def fail(self) -> None:
        """Reports that the runner broke. Any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._failed.set)

    def _take(self, events: Sequence[Event], number: int) -> None:
        self._events.extend(events)
        self._taken = number
        self._events_came.set()

    # --- life cycle -----------------------------------------------------------------------
    @property
    def running(self) -> int:
        """Requests held now."""
        return len(self._held)

    async def run(self) -> None:
        """Works until `drain` is called; then everything is given back and it returns."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()
        tasks = [
            asyncio.create_task(loop(), name=f"worker-{loop.__name__}")
            for loop in (self._claim_loop, self._write_loop, self._renew_loop, self._stop_loop)
        ]
        signals = [asyncio.create_task(event.wait()) for event in (self._draining, self._failed)]
        try:
            await asyncio.wait([*tasks, *signals], return_when=asyncio.FIRST_COMPLETED)
        finally:
            claiming, writing, *others = tasks
            await _cancel(others if self._draining.is_set() else tasks)
            await _cancel(signals)
            # A claim under way is waited for: cut off, its requests would wait for their leases;
            # later, it could take back what is given back here.
            await asyncio.wait([claiming], timeout=4 * CLAIM_WAIT)
            await _cancel([claiming])
            await self._give_back()
            await _cancel([writing])
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if self._failed.is_set():
            raise EngineFailure("the runner broke") from self._engine.failure

    def drain(self) -> None:
        """Begins the end: no more claims, the running step is finished, leases are released."""
        self._draining.set()

    async def _give_back(self) -> None:
        """Journals what is computed, then releases what is not finished."""
        await _cancel(list(self._compiling))
        self._preparing.close()
        await asyncio.to_thread(self._engine.stop, 3.0)
        await asyncio.sleep(0)  # events that the last step delivered are taken now
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(GIVE_BACK_WITHIN):
                if not self._failed.is_set():
                    await self._write_pending()
                leases = [held.lease for held in self._held.values()]
                await self._queue.release(self._unreleased)
                await self._queue.release(leases, died=self._failed.is_set())
        for held in self._held.values():
            self._observer.released(held.claim, "released", written=held.written)
        self._held.clear()

    # --- claiming -------------------------------------------------------------------------
    async def _claim_loop(self) -> None:
        backoff, heard = _Backoff(), self._clock() - HEARTBEAT
        heartbeat = min(HEARTBEAT, self._queue.limits.lease / 3)
        while not self._draining.is_set():
            waits = self._claiming_waits()
            room = 0 if waits else self._engine.room - len(self._compiling)
            newcomers = 0 if waits else self._engine.under_served_room
            if room <= 0 or self.is_stalled:
                self._room_changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room_changed.wait(), 0.05)
                if self.is_stalled or (not newcomers and self._clock() - heard < heartbeat):
                    continue
            try:
                # Without room it claims newcomers at most, and reports that this engine lives.
                wait = CLAIM_WAIT if room > 0 else 0.0
                claims = await self._queue.claim(
                    self._info(), limit=max(0, room), under_served=newcomers, wait=wait
                )
            except Unavailable:
                await backoff.sleep()
                continue
            backoff.reset()
            heard = self._clock()
            await self._admit(claims)

    @property
    def is_stalled(self) -> bool:
        """Whether the engine's thread takes far longer for a step than its steps take."""
        return self._engine.is_stalled(at_least=self._queue.limits.lease)

    def _claiming_waits(self) -> bool:
        """Whether a request has its last attempt here: nothing unproven may run beside it."""
        last = self._queue.limits.max_attempts
        return any(self._held[each].claim.attempt >= last for each in self._isolated)

    async def _admit(self, claims: Sequence[Claim]) -> None:
        """Hands claims to the engine."""
        if self._draining.is_set():
            await self._release([claim.lease for claim in claims])
            return
        for claim in claims:
            late = self._held.get(claim.request.id)
            if late is not None:  # this engine's own, whose lease ran out
                self._observer.released(late.claim, "lease_lost", written=late.written)
            self._observer.claimed(claim)
            held = LeasedWork(claim, self._clock(), written=len(claim.tokens))
            self._held[claim.request.id] = held
            if held.is_isolated:
                self._isolated.add(claim.request.id)
            else:
                self._isolated.discard(claim.request.id)
            if claim.request.grammar is None:
                self._hand_in(claim)
            else:
                task = asyncio.create_task(self._compile_then_hand_in(claim))
                self._compiling.add(task)
                task.add_done_callback(self._compiling.discard)

    async def _compile_then_hand_in(self, claim: Claim) -> None:
        prepare = partial(self._engine.prepare, claim.request)
        await self._preparing.run(claim.request.tenant, prepare)
        held = self._held.get(claim.request.id)
        if held is not None and held.claim is claim:  # else: lost or stopped meanwhile
            self._hand_in(claim)

    def _hand_in(self, claim: Claim) -> None:
        self._engine.add(
            Work(request=claim.request, tokens=claim.tokens, remaining_ms=claim.remaining_ms)
        )

    # --- journalling ----------------------------------------------------------------------
    async def _write_loop(self) -> None:
        while True:
            await self._events_came.wait()
            self._events_came.clear()
            await self._write_pending()

    async def _write_pending(self) -> None:
        """Journals all events that have come; a later step's join where the store is slow.

        One call at a time: what is on its way is settled before anything is given back.
        """
        async with self._writing:
            while self._events:
                writes = []
                while self._events:
                    event = self._events.popleft()
                    held = self._held.get(event.request_id)
                    if held is not None:  # else: fenced or stopped since it was computed
                        if isinstance(event.record, Tokens):
                            held.records.append(event.record)
                        held.ending = isinstance(event.record, End)
                        writes.append(Write(held.lease, event.record))
                if writes:
                    await self._write(writes)
            with self._progress:
                self._journalled = self._taken
                self._progress.notify_all()

    async def _write(self, writes: list[Write]) -> None:
        backoff, began = _Backoff(), self._clock()
        while True:
            start = self._clock()
            try:
                replies = await self._queue.write(writes)
            except Unavailable as error:
                if error.code == "storage_full" and start - began > STORAGE_PATIENCE:
                    await self._give_up(writes)
                    return
                await backoff.sleep()
                writes = [write for write in writes if write.lease.request_id in self._held]
                if not writes:
                    return
                continue
            self._observer.wrote(self._clock() - start)
            break
        resend: list[Write] = []
        for write, reply in zip(writes, replies, strict=True):
            resend += await self._settle(write, reply)
        if resend:
            await self._write(resend)

    async def _settle(self, write: Write, reply: WriteReply) -> list[Write]:
        """Acts on one reply; returns the writes that close a GAP, in order."""
        request_id = write.lease.request_id
        held = self._held.get(request_id)
        if held is None or held.lease != write.lease:
            return []
        if reply.status is WriteStatus.FENCED:
            self._observer.fenced()
            self._drop(request_id, cause="fenced")
            return []
        if reply.status is WriteStatus.GAP:
            missing = [record for record in held.records if record.end > reply.count]
            if not missing or missing[0].start != reply.count:
                # The store lost tokens of an earlier engine too. The next engine computes them
                # again from what the journal still holds, and gets the same.
                self._drop(request_id, cause="journal_lost")
                await self._release([write.lease])
                return []
            records: list[Tokens | End] = list(missing)
            if isinstance(write.record, End):
                records.append(write.record)
            return [Write(held.lease, record) for record in records]
        if held.written == len(held.claim.tokens) < reply.count:
            self._observer.first_token(request_id)
        held.written = reply.count
        if not held.is_isolated:
            self._isolated.discard(request_id)
        if isinstance(write.record, End):
            del self._held[request_id]
            self._isolated.discard(request_id)
            self._room_changed.set()
            self._note_end(held, write.record)
        return []

    def _note_end(self, held: LeasedWork, end: End) -> None:
        self._observer.ended(end, self._clock() - held.since)
        self._observer.released(held.claim, end.reason.value, written=end.count, end=end)

    async def _give_up(self, writes: Iterable[Write]) -> None:
        """Ends requests whose tokens the store has no room for; an end needs next to none."""
        ends: list[tuple[LeasedWork, End]] = []
        for request_id in {write.lease.request_id for write in writes}:
            held = self._held.get(request_id)
            if held is not None:
                end = End(count=held.written, reason=FinishReason.ERROR, error="storage_full")
                ends.append((held, end))
                self._drop(request_id, cause="storage_full")
        with contextlib.suppress(Unavailable):  # else the lease runs out, and another engine tries
            replies = await self._queue.write([Write(held.lease, end) for held, end in ends])
            for (held, end), reply in zip(ends, replies, strict=True):
                if reply.status in {WriteStatus.OK, WriteStatus.DUP}:
                    self._observer.ended(end, self._clock() - held.since)

    # --- leases ---------------------------------------------------------------------------
    async def _renew_loop(self) -> None:
        lease = self._queue.limits.lease
        self._renewed = self._clock()
        stalled = 0
        while True:
            await asyncio.sleep(lease / 3)
            stalled = stalled + 1 if self.is_stalled else 0
            if stalled:
                if stalled >= LOOKS_AT_STALL:
                    await self._give_up_stalled()
                continue
            self._forget_given_up()
            sent = self._clock()
            # An attempt gets all that is left of the lease: a store may be slow, and a connection
            # cut off by a time-out costs a new one, which is slower.
            left = self._renewed + lease - sent
            try:
                async with asyncio.timeout(max(lease / 3, left)):
                    lost = await self._queue.renew([held.lease for held in self._held.values()])
            except (Unavailable, TimeoutError):
                if self._clock() - self._renewed >= lease:
                    self._abandon()
                continue
            self._renewed = sent
            for request_id in lost:
                held = self._held.get(request_id)
                if held is not None and not held.ending:  # what ended meanwhile has no lease either
                    self._observer.lease_lost(1)
                    self._drop(request_id, cause="lease_lost")
            await self._release([])

    async def _give_up_stalled(self) -> None:
        """Leaves everything to other engines, as if this one had died: a request may be the cause.

        If a step ends after all, the queue hears of this engine again and takes the blame back.
        """
        leases = [held.lease for held in self._held.values()]
        if not leases:
            return
        try:
            await self._queue.release(leases, died=True)
        except Unavailable:
            return
        log.error("the engine makes no progress; gave up %d requests", len(leases))
        self._observer.lease_lost(len(leases))
        for request_id in [lease.request_id for lease in leases]:
            held = self._held.pop(request_id, None)
            if held is not None:
                self._observer.released(held.claim, "stalled", written=held.written)
        self._given_up.update(lease.request_id for lease in leases)
        self._isolated.intersection_update(self._held)

    def _forget_given_up(self) -> None:
        """Takes from the engine, which has recovered, what it was working on."""
        for request_id in self._given_up - self._held.keys():
            self._engine.abort(request_id)
        self._given_up.clear()

    async def _release(self, leases: Sequence[Lease]) -> None:
        """Gives these leases back and those that could not be given back before."""
        self._unreleased += leases
        sent = list(self._unreleased)
        if not sent:
            return
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(self._queue.limits.lease):
                await self._queue.release(sent)
                self._unreleased = [each for each in self._unreleased if each not in sent]

    def _abandon(self) -> None:
        """Stops computing what may be another engine's by now: it could not be journalled.

        What is not another's when the store is back is released then, without blame.
        """
        if self._held:
            self._observer.lease_lost(len(self._held))
        self._unreleased += [held.lease for held in self._held.values()]
        for request_id in list(self._held):
            self._drop(request_id, cause="lease_lost")

    async def _stop_loop(self) -> None:
        backoff = _Backoff()
        while True:
            try:
                async for request_id in self._queue.stops():
                    self._drop(request_id, cause="cancelled")
            except Unavailable:
                await backoff.sleep()

    def _drop(self, request_id: str, *, cause: str) -> None:
        held = self._held.pop(request_id, None)
        if held is None:
            return
        self._engine.abort(request_id)
        self._isolated.discard(request_id)
        self._room_changed.set()
        self._observer.wasted(sum(len(record.ids) for record in held.records), cause)
        self._observer.released(held.claim, cause, written=held.written)


class _Backoff:
    """Waits a little longer each time, up to a second."""

    def __init__(self) -> None:
        self._delay = 0.05

    def reset(self) -> None:
        self._delay = 0.05

    async def sleep(self) -> None:
        await asyncio.sleep(self._delay)
        self._delay = min(1.0, self._delay * 2)


async def _cancel(tasks: Sequence[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["EngineFailure", "Worker"]
