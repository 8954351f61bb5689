"""Worker: connects the queue and the engine.

It runs in an event loop; the engine computes in a thread of its own, so a long step delays neither
a renewal nor a write. If a step does not end at all, the worker stops claiming and gives its
requests up, so that other engines continue them. Independent of HTTP and tensors.

    claim loop     queue.claim -> WorkTable -> engine.add    only what the engine has room for
    JournalWriter  engine events -> queue.write              one round trip for all events at hand
    LeaseKeeper    queue.renew every third of a lease        what is lost is aborted
    announce loop  engine.held_prefixes -> queue.hold        so that chats come back to their engine
    stop loop      queue.stops -> engine.abort               a hint: the next renewal finds out too

Every call of the queue may raise `Unavailable`. Claims, writes, renewals and the stop loop retry
until they succeed or the lease is over; a release is repeated with the next renewal.

The queue decides which requests run isolated (see `service.queues.contract`). The
worker does two things for that. While a request is isolated, each of its tokens is journalled
before the next step computes, so that the journal shows the position of a death. While it has its
last attempt, nothing else is claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial

from service.engine.inbox import Work
from service.engine.thread import EngineThread
from service.errors import Unavailable
from service.fair_pool import FairPool
from service.messages import Event
from service.queues.contract import Claim, EngineInfo, Queue
from service.worker.journal import JournalWriter
from service.worker.leased_work import WorkTable
from service.worker.leases import Backoff, LeaseKeeper
from service.worker.observer import WorkerObserver

ANNOUNCE_EVERY = 1.0  # seconds; the prefixes that the engine holds, for other processes to see
CLAIM_WAIT = 0.25  # seconds; a drain waits for the claim in flight
HEARTBEAT = 1.0  # seconds at most between two heartbeats; a third of a lease if that is less
GIVE_BACK_WITHIN = 3.0  # seconds; if the store is away for longer, the leases expire
PREPARING_THREADS = 2  # for grammars, tenants in turns


class EngineFailure(Exception):
    """The runner failed. The process must end: nothing that it computes can be trusted."""


class Worker:
    """Serves one queue with one engine until `drain` or a failure of the runner.

    `run` raises EngineFailure if the engine fails. `drain` releases every lease at once, so that
    other engines continue the requests where their journals end.
    """

    def __init__(
        self,
        queue: Queue,
        engine: EngineThread,
        *,
        info: Callable[[], EngineInfo],
        observer: WorkerObserver,
        journal_interval: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._engine = engine
        self._info = info
        self._clock = clock
        self._table = WorkTable(engine, observer, clock=clock)
        self._leases = LeaseKeeper(queue, self._table)
        self._journal = JournalWriter(queue, self._table, self._leases, interval=journal_interval)
        self._preparing = FairPool("grammar preparation", threads=PREPARING_THREADS)
        self._compiling: set[asyncio.Task[None]] = set()  # claims whose grammar is not ready yet
        self._draining = asyncio.Event()
        self._failed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- other threads --------------------------------------------------------------------
    def deliver(self, events: Sequence[Event]) -> None:
        """Takes the events of one step. The engine's thread."""
        self._journal.deliver(events)

    def settle(self) -> bool:
        """Waits, if requests are isolated, until delivered events are in the journal; returns
        whether any is. The engine's thread, before it computes a step.
        """
        return self._journal.settle()

    def fail(self) -> None:
        """Reports that the runner failed. Any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._failed.set)

    # --- life cycle -----------------------------------------------------------------------
    @property
    def running(self) -> int:
        """Number of leased requests."""
        return len(self._table.items)

    @property
    def is_stalled(self) -> bool:
        """Whether the engine takes far longer for a step than its steps take."""
        return self._leases.is_stalled

    async def run(self) -> None:
        """Works until `drain` is called; then all leases are released and it returns."""
        self._loop = asyncio.get_running_loop()
        self._journal.open()
        self._engine.start()
        loops = [self._claim_loop, self._journal.run, self._leases.run, self._stop_loop]
        if self._queue.shared:
            loops.append(self._announce_loop)
        tasks = [asyncio.create_task(loop(), name=f"worker {loop.__qualname__}") for loop in loops]
        signals = [asyncio.create_task(event.wait()) for event in (self._draining, self._failed)]
        try:
            await asyncio.wait([*tasks, *signals], return_when=asyncio.FIRST_COMPLETED)
        finally:
            claiming, writing, *others = tasks
            await _cancel(others if self._draining.is_set() else tasks)
            await _cancel(signals)
            # Waits for a claim in flight. If it were cancelled, its requests would wait until their
            # leases expire; if it ended later, it could claim again what is released here.
            await asyncio.wait([claiming], timeout=4 * CLAIM_WAIT)
            await _cancel([claiming])
            await self._give_back()
            await _cancel([writing])
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if self._failed.is_set():
            raise EngineFailure("the runner failed") from self._engine.failure

    def drain(self) -> None:
        """Begins to end: no more claims; the step in flight is finished, leases are released."""
        self._draining.set()

    async def _give_back(self) -> None:
        """Journals what is computed, then releases what is not finished."""
        await _cancel(list(self._compiling))
        self._preparing.close()
        await asyncio.to_thread(self._engine.stop, 3.0)
        await asyncio.sleep(0)  # receives the events that the last step delivered
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(GIVE_BACK_WITHIN):
                if not self._failed.is_set():
                    await self._journal.flush()
                await self._leases.release_all(died=self._failed.is_set())
        for request_id in list(self._table.items):
            self._table.leave(request_id, cause="released")

    # --- claiming -------------------------------------------------------------------------
    async def _claim_loop(self) -> None:
        backoff, heard = Backoff(), self._clock() - HEARTBEAT
        heartbeat = min(HEARTBEAT, self._queue.limits.lease / 3)
        while not self._draining.is_set():
            room, under_served = self._room()
            if room <= 0 or self.is_stalled:
                self._table.room_changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._table.room_changed.wait(), 0.05)
                if self.is_stalled or (not under_served and self._clock() - heard < heartbeat):
                    continue
            try:
                # Without room it only claims requests of under-served tenants, and reports that
                # this engine lives.
                wait = CLAIM_WAIT if room > 0 else 0.0
                claims = await self._queue.claim(
                    self._info(), limit=max(0, room), under_served=under_served, wait=wait
                )
            except Unavailable:
                await backoff.sleep()
                continue
            backoff.reset()
            heard = self._clock()
            await self._admit(claims)
        with contextlib.suppress(Unavailable):  # work that comes now wakes other engines
            await self._queue.claim(self._info(), limit=0, wait=0.0)

    def _room(self) -> tuple[int, int]:
        """Requests to claim: of any tenant, and beyond those of under-served tenants."""
        if self._table.has_attempt(self._queue.limits.max_attempts):
            return 0, 0  # a request has its last attempt here: it must run alone
        return self._engine.room - len(self._compiling), self._engine.under_served_room

    async def _admit(self, claims: Sequence[Claim]) -> None:
        """Adds claims to the engine."""
        if self._draining.is_set():
            await self._leases.release([claim.lease for claim in claims])
            return
        for claim in claims:
            self._table.add(claim)
            if claim.request.grammar is None:
                self._add(claim)
            else:
                task = asyncio.create_task(self._compile_then_add(claim))
                self._compiling.add(task)
                task.add_done_callback(self._compiling.discard)

    async def _compile_then_add(self, claim: Claim) -> None:
        prepare = partial(self._engine.prepare, claim.request)
        await self._preparing.run(claim.request.tenant, prepare)
        work = self._table.items.get(claim.request.id)
        if work is not None and work.claim is claim:  # else: lost or stopped meanwhile
            self._add(claim)

    def _add(self, claim: Claim) -> None:
        self._engine.add(
            Work(request=claim.request, tokens=claim.tokens, remaining_ms=claim.remaining_ms)
        )

    async def _announce_loop(self) -> None:
        """A hint: what cannot be sent now is sent next time."""
        while True:
            await asyncio.sleep(ANNOUNCE_EVERY)
            with contextlib.suppress(Unavailable):
                await self._queue.hold(self._info().id, self._engine.held_prefixes())

    async def _stop_loop(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async for request_id in self._queue.stops():
                    self._table.drop(request_id, cause="cancelled")
            except Unavailable:
                await backoff.sleep()


async def _cancel(tasks: Sequence[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
