"""FairPool: threads for one kind of blocking work, shared fairly by tenants.

Each kind of work that clients cause has a pool of its own, so a flood of one kind does not delay
the others. Within a pool, the tenant that was served least recently is next: a call of an idle
tenant waits for the running jobs, but not for the waiting jobs of other tenants.

    run -> [the tenant's queue] -> the tenant's turn, a free thread -> result

The waiting jobs are limited by weight (for example bytes of text), per tenant and in total; one job
may always wait, whatever its weight. A call that is cancelled leaves its queue; a job that a thread
has started runs to its end.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, TypeVar

from service.errors import RateLimited, Unavailable

T = TypeVar("T")

UNBOUNDED = 2**63


@dataclass(eq=False, slots=True)
class _Job:
    tenant: str
    weight: int
    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class FairPool:
    """Safe to use from several event loops. `work` is its name in errors, such as "tokenising".
    `refused` is called for each job that exceeds a limit.
    """

    def __init__(
        self,
        work: str,
        *,
        threads: int,
        max_weight: int = UNBOUNDED,  # of all waiting jobs
        max_tenant_weight: int = UNBOUNDED,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._work = work
        self._max_weight = max_weight
        self._max_tenant_weight = max_tenant_weight
        self._refused = refused
        self._num_threads = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=work.replace(" ", "-"))
        self._lock = Lock()
        self._queues: dict[
            str, deque[_Job]
        ] = {}  # tenant -> waiting jobs, first in first out; never empty
        self._waiting: Counter[str] = Counter()  # tenant -> weight of its waiting jobs
        self._running: Counter[str] = Counter()
        self._served: dict[str, int] = {}  # tenant with jobs -> number of its latest turn
        self._turns = 0

    @property
    def waiting(self) -> int:
        """Number of waiting jobs."""
        with self._lock:
            return sum(map(len, self._queues.values()))

    async def run(self, tenant: str, function: Callable[[], T], *, weight: int = 1) -> T:
        """Runs `function` in a thread at the tenant's turn and returns its result.

        Raises RateLimited or Unavailable at once if too many jobs of the tenant, or of all tenants,
        are waiting.
        """
        job = _Job(tenant, weight, function)
        self._enqueue(job)
        try:
            result: T = await asyncio.wrap_future(job.future)
        finally:
            self._withdraw(job)
        return result

    def close(self) -> None:
        """Cancels the waiting jobs. Does not wait for the running ones."""
        with self._lock:
            waiting = [job for queue in self._queues.values() for job in queue]
        for job in waiting:
            self._withdraw(job)
        self._threads.shutdown(wait=False)

    def _enqueue(self, job: _Job) -> None:
        with self._lock:
            own, total = self._waiting[job.tenant], self._waiting.total()
            if own and own + job.weight > self._max_tenant_weight:
                self._refused()
                raise RateLimited(f"too many of your calls are waiting for {self._work}")
            if total and total + job.weight > self._max_weight:
                self._refused()
                raise Unavailable(f"too many calls are waiting for {self._work}")
            self._queues.setdefault(job.tenant, deque()).append(job)
            self._waiting[job.tenant] += job.weight
        self._dispatch()

    def _dispatch(self) -> None:
        """Starts waiting jobs while threads are free."""
        while (job := self._take()) is not None:
            self._threads.submit(job.function).add_done_callback(partial(self._finish, job))

    def _take(self) -> _Job | None:
        """Removes and returns the next job; None if there is none or no thread is free."""
        with self._lock:
            while self._queues and self._running.total() < self._num_threads:
                tenant = min(self._queues, key=lambda name: self._served.get(name, 0))
                job = self._queues[tenant][0]
                self._remove(job)
                if not job.future.set_running_or_notify_cancel():
                    self._forget_idle(tenant)
                    continue
                self._running[tenant] += 1
                self._turns += 1
                self._served[tenant] = self._turns
                return job
        return None

    def _finish(self, job: _Job, done: Future[Any]) -> None:
        with self._lock:
            self._running[job.tenant] -= 1
            self._forget_idle(job.tenant)
        error = done.exception()
        if error is None:
            job.future.set_result(done.result())
        else:
            job.future.set_exception(error)
        self._dispatch()

    def _remove(self, job: _Job) -> None:
        queue = self._queues[job.tenant]
        queue.remove(job)  # the first one, unless it is withdrawn
        self._waiting[job.tenant] -= job.weight
        if not queue:
            del self._queues[job.tenant]

    def _withdraw(self, job: _Job) -> None:
        """Cancels a job that has not started."""
        with self._lock:
            if job in self._queues.get(job.tenant, ()):
                self._remove(job)
                self._forget_idle(job.tenant)
        job.future.cancel()

    def _forget_idle(self, tenant: str) -> None:
        if not self._running[tenant] and tenant not in self._queues:
            for table in (self._running, self._waiting, self._served):
                table.pop(tenant, None)
