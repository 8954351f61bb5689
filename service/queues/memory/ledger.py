"""Ledger: what tenants and keys have in flight, whose turn it is, and what keys have used of their
minute, in memory. The Redis queue keeps the same in `submit.lua` and `shared.lua`.

Turns are start-time fair queueing (Goyal et al., SIGCOMM 1996): a request's turn is where its
tenant's last one ends, in tokens, or now, which is the latest turn that was taken. So tenants that
wait are served equal numbers of tokens, and who comes back from rest is next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from service.messages import Allowance, GenerationRequest, Submission
from service.queues.admission import MINUTE, Meter, Usage, admission_cost
from service.queues.contract import QueueLimits, SubmitStatus

PATIENCE = 1e-6
"""Seconds: sums of fractions of a minute do not come out even."""


class Ledger:
    """The counters of one queue. Times are the queue's own clock's."""

    def __init__(self, limits: QueueLimits, *, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._in_flight: Counter[tuple[str, str]] = Counter()  # ("tenant" or "key", name)
        self._running: Counter[str] = Counter()  # by tenant
        self._num_running = 0
        self._ends: dict[str, float] = {}  # tenant in flight -> where its last turn ends
        self._now_served = 0.0  # the latest turn that was taken
        self._free_at: dict[tuple[str, str], float] = {}  # (key, unit) -> see `meters`

    def __len__(self) -> int:
        """Counters and meters in use."""
        counters = len(self._in_flight) + len(self._running) + len(self._ends)
        return counters + len(self._free_at)

    def refusal(self, submission: Submission, *, tokens: int) -> SubmitStatus | None:
        """TENANT or RATE, or None where the tenant and the key may have so much more."""
        allowance, num_requests = submission.allowance, len(submission.requests)
        tenants = self._in_flight["tenant", submission.tenant]
        if tenants + num_requests > self._limits.max_per_tenant:
            return SubmitStatus.TENANT
        if allowance is None:
            return None
        most = allowance.max_in_flight
        if most is not None and self._in_flight["key", allowance.key] + num_requests > most:
            return SubmitStatus.TENANT
        return SubmitStatus.RATE if self.usage(allowance, tokens=tokens).wait else None

    def charge(self, allowance: Allowance) -> Usage:
        """See `Queue.charge`."""
        key, limit = allowance.key, allowance.requests_per_minute
        if limit is None:
            return Usage()
        wait = self._wait(key, "requests", limit=limit, amount=1)
        if not wait:
            self._add(key, "requests", limit=limit, amount=1)
        return Usage(requests=Meter(limit=limit, used=self._used(key, "requests")), wait=wait)

    def usage(self, allowance: Allowance | None, *, tokens: int = 0) -> Usage:
        """The tokens of a key's minute; `wait` is for a submission of so many."""
        if allowance is None or allowance.tokens_per_minute is None:
            return Usage()
        key, limit = allowance.key, allowance.tokens_per_minute
        wait = self._wait(key, "tokens", limit=limit, amount=tokens)
        return Usage(tokens=Meter(limit=limit, used=self._used(key, "tokens")), wait=wait)

    def enter(self, submission: Submission, *, tokens: int) -> list[float]:
        """Counts what was admitted. Its requests' turns: of those that wait the least is next."""
        allowance, num_requests = submission.allowance, len(submission.requests)
        self._in_flight["tenant", submission.tenant] += num_requests
        if allowance is not None:
            self._in_flight["key", allowance.key] += num_requests
            self._add(allowance.key, "tokens", limit=allowance.tokens_per_minute, amount=tokens)
        return [self._turn(submission.tenant, request) for request in submission.requests]

    def begin(self, tenant: str, *, turn: float) -> None:
        """A request runs for the first time."""
        self._running[tenant] += 1
        self._num_running += 1
        self._now_served = max(self._now_served, turn)

    def is_below_share(self, tenant: str) -> bool:
        """Whether less of it runs than of the tenants in flight on average."""
        return (self._running[tenant] + 1) * len(self._ends) <= self._num_running

    def leave(self, tenant: str, allowance: Allowance | None, *, tokens: int, ran: bool) -> None:
        """Counts down a request that ended; `tokens` is what it took beyond what was admitted,
        below 0 what it left.
        """
        self._running[tenant] -= ran
        self._num_running -= ran
        self._count_down(("tenant", tenant))
        if not self._in_flight["tenant", tenant]:
            del self._ends[tenant], self._running[tenant]
        if not self._ends:
            self._now_served = 0.0
        if allowance is not None:
            self._count_down(("key", allowance.key))
            self._add(allowance.key, "tokens", limit=allowance.tokens_per_minute, amount=tokens)

    def forget(self) -> None:
        """Drops the meters that say nothing any more."""
        now = self._clock()
        for meter in [meter for meter, at in self._free_at.items() if at <= now]:
            del self._free_at[meter]

    def _turn(self, tenant: str, request: GenerationRequest) -> float:
        turn = max(self._now_served, self._ends.get(tenant, 0.0))
        self._ends[tenant] = turn + admission_cost(request)
        return turn

    def _count_down(self, counter: tuple[str, str]) -> None:
        self._in_flight[counter] -= 1
        if not self._in_flight[counter]:
            del self._in_flight[counter]

    def _used(self, key: str, unit: str) -> float:
        return max(0.0, self._free_at.get((key, unit), 0.0) - self._clock())

    def _wait(self, key: str, unit: str, *, limit: int, amount: int) -> float:
        over = self._used(key, unit) + amount * MINUTE / limit - MINUTE
        return over if over > PATIENCE else 0.0

    def _add(self, key: str, unit: str, *, limit: int | None, amount: int) -> None:
        if limit is not None:
            used = self._used(key, unit) + amount * MINUTE / limit
            self._free_at[key, unit] = self._clock() + used
