"""LeaseKeeper: renews the leases of a worker and releases them.

If the engine's step does not end, the leases are neither renewed nor kept: they are released as if
this engine had died, so that other engines continue the requests. If the store cannot be reached
for a whole lease, the requests are dropped and their leases released later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from service.errors import Unavailable
from service.queues.contract import Lease, Queue
from service.worker.leased_work import WorkTable

log = logging.getLogger("quire.worker")

STALLED_CHECKS = 2  # a third of a lease apart; a process that was frozen as a whole sees one
FIRST, LONGEST = 0.05, 1.0  # seconds of a backoff's pauses


class Backoff:
    """Each pause is twice as long as the previous one, up to `LONGEST`."""

    def __init__(self) -> None:
        self._delay = FIRST

    def reset(self) -> None:
        self._delay = FIRST

    async def sleep(self) -> None:
        await asyncio.sleep(self._delay)
        self._delay = min(LONGEST, self._delay * 2)


class LeaseKeeper:
    """Used in the event loop."""

    def __init__(self, queue: Queue, table: WorkTable) -> None:
        self._queue = queue
        self._table = table
        self._renewed = table.clock()
        self._unreleased: list[Lease] = []  # to be released when the store answers
        self._given_up: set[str] = set()  # requests that a stalled engine still has

    @property
    def is_stalled(self) -> bool:
        """Whether the engine takes far longer for a step than its steps take."""
        return self._table.engine.is_stalled(at_least=self._queue.limits.lease)

    async def run(self) -> None:
        """Renews every third of a lease, until cancelled."""
        lease = self._queue.limits.lease
        self._renewed = self._table.clock()
        stalled = 0
        while True:
            await asyncio.sleep(lease / 3)
            stalled = stalled + 1 if self.is_stalled else 0
            if stalled:
                if stalled >= STALLED_CHECKS:
                    await self._give_up_stalled()
                continue
            self._abort_given_up()
            await self._renew(lease)

    async def release(self, leases: Sequence[Lease]) -> None:
        """Releases these leases and those that could not be released before.

        If the store cannot be reached, that is repeated with the next renewal.
        """
        self._unreleased += leases
        sent = list(self._unreleased)
        if not sent:
            return
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(self._queue.limits.lease):
                await self._queue.release(sent)
                self._unreleased = [each for each in self._unreleased if each not in sent]

    async def release_all(self, *, died: bool) -> None:
        """Releases everything, once. Raises Unavailable."""
        leases = self._table.leases
        await self._queue.release(self._unreleased)
        await self._queue.release(leases, died=died)

    async def _renew(self, lease: float) -> None:
        sent = self._table.clock()
        # An attempt gets all that is left of the lease: a store may be slow, and a connection that
        # a timeout closes costs a new one, which is slower.
        left = self._renewed + lease - sent
        try:
            async with asyncio.timeout(max(lease / 3, left)):
                lost = await self._queue.renew(self._table.leases)
        except (Unavailable, TimeoutError):
            if self._table.clock() - self._renewed >= lease:
                self._drop_all()
            return
        self._renewed = sent
        for request_id in lost:
            work = self._table.items.get(request_id)
            if work is not None and not work.ending:  # what ended meanwhile has no lease either
                self._table.observer.lease_lost(1)
                self._table.drop(request_id, cause="lease_lost")
        await self.release([])

    async def _give_up_stalled(self) -> None:
        """Leaves everything to other engines, as if this one had died: a request may be the cause.

        If the step ends after all, the queue hears from this engine again and revokes the blame.
        """
        leases = self._table.leases
        if not leases:
            return
        try:
            await self._queue.release(leases, died=True)
        except Unavailable:
            return
        log.error("the engine makes no progress; gave up %d requests", len(leases))
        self._table.observer.lease_lost(len(leases))
        for lease in leases:
            self._table.leave(lease.request_id, cause="stalled")
        self._given_up.update(lease.request_id for lease in leases)

    def _abort_given_up(self) -> None:
        """Aborts in the engine, which has recovered, what was given up."""
        for request_id in self._given_up - self._table.items.keys():
            self._table.engine.abort(request_id)
        self._given_up.clear()

    def _drop_all(self) -> None:
        """Stops computing what may be another engine's by now: it could not be journalled.

        What is still this engine's when the store is back is released then, without blame.
        """
        leases = self._table.leases
        if leases:
            self._table.observer.lease_lost(len(leases))
        self._unreleased += leases
        for lease in leases:
            self._table.drop(lease.request_id, cause="lease_lost")
