"""FairPool: threads for one kind of blocking work, shared by tenants in turns.

Each kind of work that clients cause has a pool of its own, so a flood of one kind delays no other
kind; and within a pool the tenant that was served least recently is next. So a call of a tenant
that was at rest waits for the work that runs, never for what another tenant has waiting.

    run -> [line of the tenant] -> a thread is free, the tenant's turn -> result

What waits is bounded by its weight (bytes of text, say), for each tenant and in all; one call may
always wait, however heavy. A call that is cancelled leaves its line; what a thread has begun goes
on to its end.
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
    """Safe to use from several event loops; `work` names it in errors, such as "tokenising"."""

    def __init__(
        self,
        work: str,
        *,
        threads: int,
        max_weight: int = UNBOUNDED,  # waiting in all
        max_tenant_weight: int = UNBOUNDED,
    ) -> None:
        self._work = work
        self._max_weight = max_weight
        self._max_tenant_weight = max_tenant_weight
        self._num_threads = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=work.replace(" ", "-"))
        self._lock = Lock()
        self._lines: dict[str, deque[_Job]] = {}  # tenant -> its jobs in order; never empty
        self._waiting: Counter[str] = Counter()  # tenant -> weight in its line
        self._running: Counter[str] = Counter()
        self._served: dict[str, int] = {}  # tenant with jobs -> number of its latest turn
        self._turns = 0

    @property
    def waiting(self) -> int:
        """Jobs in the lines."""
        with self._lock:
            return sum(map(len, self._lines.values()))

    async def run(self, tenant: str, function: Callable[[], T], *, weight: int = 1) -> T:
        """The result of `function`, called in a thread at the tenant's turn.

        Raises RateLimited or Unavailable, before anything is done, if the tenant or all tenants
        have too much waiting.
        """
        job = _Job(tenant, weight, function)
        self._enqueue(job)
        try:
            result: T = await asyncio.wrap_future(job.future)
        finally:
            self._withdraw(job)
        return result

    def close(self) -> None:
        """Waits for nothing; what is in the lines is cancelled."""
        with self._lock:
            waiting = [job for line in self._lines.values() for job in line]
        for job in waiting:
            self._withdraw(job)
        self._threads.shutdown(wait=False)

    def _enqueue(self, job: _Job) -> None:
        with self._lock:
            own, total = self._waiting[job.tenant], self._waiting.total()
            if own and own + job.weight > self._max_tenant_weight:
                raise RateLimited(f"too many of your calls are waiting for {self._work}")
            if total and total + job.weight > self._max_weight:
                raise Unavailable(f"too many calls are waiting for {self._work}")
            self._lines.setdefault(job.tenant, deque()).append(job)
            self._waiting[job.tenant] += job.weight
        self._dispatch()

    def _dispatch(self) -> None:
        """Hands jobs to the threads that are free."""
        while (job := self._take()) is not None:
            self._threads.submit(job.function).add_done_callback(partial(self._finish, job))

    def _take(self) -> _Job | None:
        """The job whose turn it is, if there is a thread for it."""
        with self._lock:
            while self._lines and self._running.total() < self._num_threads:
                tenant = min(self._lines, key=lambda name: self._served.get(name, 0))
                job = self._lines[tenant][0]
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
        line = self._lines[job.tenant]
        line.remove(job)  # the first one, unless it is withdrawn
        self._waiting[job.tenant] -= job.weight
        if not line:
            del self._lines[job.tenant]

    def _withdraw(self, job: _Job) -> None:
        """Has no effect on a job that has begun."""
        with self._lock:
            if job in self._lines.get(job.tenant, ()):
                self._remove(job)
                self._forget_idle(job.tenant)
        job.future.cancel()

    def _forget_idle(self, tenant: str) -> None:
        if not self._running[tenant] and tenant not in self._lines:
            for table in (self._running, self._waiting, self._served):
                table.pop(tenant, None)
