"""JournalWriter: engine events -> the queue's journal. One round trip for all events at hand.

A record costs the store far more than a token. So if tokens of an answer come faster than the
`interval`, they are held for it since the last record, and sent as one. First and last tokens, and
those of isolated requests, are sent at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from service.errors import Unavailable
from service.messages import End, Event, FinishReason, Tokens
from service.queues.contract import Lease, Queue, Write, WriteReply, WriteStatus
from service.queues.waiting import woken_within
from service.worker.leased_work import LeasedWork, WorkTable
from service.worker.leases import Backoff, LeaseKeeper

STORAGE_PATIENCE = 5.0  # seconds for which a write is retried while the store is full
AGAIN = 0.1  # seconds after which writes to a part of the store that is away are repeated
SETTLE_WITHIN = 1.0  # seconds that a step waits for the journal while requests are isolated
POSTPONED = {WriteStatus.AWAY, WriteStatus.STORAGE}


class JournalWriter:
    """Used in the event loop, except `deliver` and `settle`."""

    def __init__(
        self, queue: Queue, table: WorkTable, leases: LeaseKeeper, *, interval: float
    ) -> None:
        self._queue = queue
        self._interval = interval
        self._table = table
        self._leases = leases
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: deque[Event] = deque()
        self._unsent: dict[str, LeasedWork] = {}  # with tokens that are not sent yet
        self._events_came = asyncio.Event()
        self._postponed: list[Write] = []  # their part of the store was away or full
        self._again: asyncio.TimerHandle | None = None  # repeats them; one at a time
        self._full_since: dict[Lease, float] = {}
        self._writing = asyncio.Lock()
        self._delivered = self._received = self._journalled = 0  # steps whose events got so far
        self._progress = threading.Condition()  # of `_journalled`

    # --- the engine's thread --------------------------------------------------------------
    def deliver(self, events: Sequence[Event]) -> None:
        """Takes the events of one step."""
        if self._loop is not None:
            self._delivered += 1
            self._loop.call_soon_threadsafe(self._receive, events, self._delivered)

    def settle(self) -> bool:
        """Waits, if requests are isolated, until delivered events are in the journal; returns
        whether any is.
        """
        if not self._table.has_isolated:
            return False
        with self._progress:
            self._progress.wait_for(
                lambda: self._journalled >= self._delivered or not self._table.has_isolated,
                SETTLE_WITHIN,
            )
        return True

    # --- the event loop -------------------------------------------------------------------
    def open(self) -> None:
        """Accepts events from now on."""
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Writes events as they come, until cancelled."""
        while True:
            await woken_within(self._seconds_to_send(), self._events_came)
            self._events_came.clear()
            await self.flush(held=False)

    async def flush(self, *, held: bool = True) -> None:
        """Writes all events that have come, with or without tokens that can still be held. If the
        store is slow, later steps join.

        One call at a time: writes in flight are settled before leases are released.
        """
        async with self._writing:
            writes = [write for write in self._postponed if self._is_leased(write)]
            self._postponed.clear()
            still = {write.lease for write in writes}
            self._full_since = {k: since for k, since in self._full_since.items() if k in still}
            while writes := [*writes, *self._collect(held=held)]:
                await self._write(writes)
                writes = []
            with self._progress:
                self._journalled = self._received
                self._progress.notify_all()

    def _collect(self, *, held: bool) -> list[Write]:
        """What has to be sent now, in order. Later events join."""
        writes: list[Write] = []
        while self._events:
            event = self._events.popleft()
            work = self._table.items.get(event.request_id)
            if work is None:  # fenced or stopped since it was computed
                continue
            if isinstance(event.record, Tokens):
                work.records.append(event.record)
                self._unsent[event.request_id] = work
            else:
                work.ending = True
                writes += self._unsent_of(event.request_id)
                writes.append(Write(work.lease, event.record))
        now = self._table.clock()
        for request_id, work in list(self._unsent.items()):
            if held or now >= self._due(work):
                writes += self._unsent_of(request_id)
        return writes

    def _unsent_of(self, request_id: str) -> list[Write]:
        work = self._unsent.pop(request_id, None)
        if work is None or self._table.items.get(request_id) is not work:
            return []
        return [Write(work.lease, work.take_unsent(self._table.clock()))]

    def _due(self, work: LeasedWork) -> float:
        """When the tokens of a request that are not sent yet have to be sent."""
        return work.sent_at + (self._interval if work.sent and not work.is_isolated else 0.0)

    def _seconds_to_send(self) -> float | None:
        """Until held tokens have to be sent; None: none are held."""
        if not self._unsent:
            return None
        return max(0.0, min(map(self._due, self._unsent.values())) - self._table.clock())

    def _receive(self, events: Sequence[Event], number: int) -> None:
        self._events.extend(events)
        self._received = number
        self._events_came.set()

    async def _write(self, writes: list[Write]) -> None:
        backoff, began = Backoff(), self._table.clock()
        while True:
            start = self._table.clock()
            try:
                replies = await self._queue.write(writes)
            except Unavailable as error:
                if error.code == "storage_full" and start - began > STORAGE_PATIENCE:
                    await self._give_up(writes)
                    return
                await backoff.sleep()
                writes = [write for write in writes if write.lease.request_id in self._table.items]
                if not writes:
                    return
                continue
            self._table.observer.wrote(self._table.clock() - start)
            break
        await self._postpone(writes, replies)
        resend: list[Write] = []
        for write, reply in zip(writes, replies, strict=True):
            resend += await self._settle_reply(write, reply)
        if resend:
            await self._write(resend)

    async def _postpone(self, writes: Sequence[Write], replies: Sequence[WriteReply]) -> None:
        """Keeps what a part of the store did not take, without delaying what others take."""
        now, patience_over = self._table.clock(), []
        for write, reply in zip(writes, replies, strict=True):
            if reply.status is not WriteStatus.STORAGE:
                self._full_since.pop(write.lease, None)
            elif now - self._full_since.setdefault(write.lease, now) > STORAGE_PATIENCE:
                patience_over.append(write)
                continue
            if reply.status in POSTPONED:
                self._postponed.append(write)
        if self._postponed:
            if self._again is not None:
                self._again.cancel()
            self._again = asyncio.get_running_loop().call_later(AGAIN, self._events_came.set)
        if patience_over:
            await self._give_up(patience_over)
            for write in patience_over:
                self._full_since.pop(write.lease, None)

    def _is_leased(self, write: Write) -> bool:
        work = self._table.items.get(write.lease.request_id)
        return work is not None and work.lease == write.lease

    async def _settle_reply(self, write: Write, reply: WriteReply) -> list[Write]:
        """Acts on one reply; returns the writes that close a GAP, in order."""
        request_id = write.lease.request_id
        work = self._table.items.get(request_id)
        if work is None or work.lease != write.lease or reply.status in POSTPONED:
            return []
        if reply.status is WriteStatus.FENCED:
            self._table.observer.fenced()
            self._table.drop(request_id, cause="fenced")
            return []
        if reply.status is WriteStatus.GAP:
            return await self._close_gap(work, write, reply.count)
        self._table.journalled(work, reply.count)
        if isinstance(write.record, End):
            self._table.finish(work, write.record)
        return []

    async def _close_gap(self, work: LeasedWork, write: Write, count: int) -> list[Write]:
        """The store lost records; it has `count` tokens. Returns the writes to repeat."""
        missing = [record for record in work.records if record.end > count]
        if not missing or missing[0].start != count:
            # The store lost tokens of an earlier engine too. The next engine computes them again
            # from what the journal still has, and gets the same.
            self._table.drop(write.lease.request_id, cause="journal_lost")
            await self._leases.release([write.lease])
            return []
        records: list[Tokens | End] = list(missing)
        if isinstance(write.record, End):
            records.append(write.record)
        return [Write(work.lease, record) for record in records]

    async def _give_up(self, writes: Iterable[Write]) -> None:
        """Ends requests whose tokens the store has no room for; an end needs next to none."""
        ends: list[tuple[LeasedWork, End]] = []
        for request_id in {write.lease.request_id for write in writes}:
            work = self._table.items.get(request_id)
            if work is not None:
                end = End(count=work.written, reason=FinishReason.ERROR, error="storage_full")
                ends.append((work, end))
                self._table.drop(request_id, cause="storage_full")
        with contextlib.suppress(Unavailable):  # else the lease expires, and another engine tries
            replies = await self._queue.write([Write(work.lease, end) for work, end in ends])
            for (work, end), reply in zip(ends, replies, strict=True):
                if reply.status in {WriteStatus.OK, WriteStatus.DUP}:
                    self._table.observer.ended(end, self._table.clock() - work.since)
