"""Tenants: requests in flight per tenant and key, turns of tenants, and rate meters of keys.

The Redis queue keeps the same in `submit.lua`, `requests.lua` and `meters.lua`.

Turns are start-time fair queueing (Goyal et al., SIGCOMM 1996): a request's turn is the end of its
tenant's last one, in tokens, or the latest turn that was taken, if that is later. So waiting
tenants are served equal numbers of tokens, and a tenant that was idle is next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from service.messages import Allowance, GenerationRequest, Submission
from service.queues.admission import MINUTE, Meter, RateUsage, admission_cost
from service.queues.contract import QueueLimits, SubmitStatus

TOLERANCE = 1e-6
"""Seconds, for rounding errors in sums of fractions of a minute."""


class Tenants:
    """The counters of one queue. Times are from the queue's clock."""

    def __init__(self, limits: QueueLimits, *, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._in_flight: Counter[tuple[str, str]] = Counter()  # ("tenant" or "key", name)
        self._running: Counter[str] = Counter()  # by tenant
        self._num_running = 0
        self._ends: dict[str, float] = {}  # tenant in flight -> end of its last turn
        self._latest_turn = 0.0  # of those taken
        self._zero_at: dict[tuple[str, str], float] = {}  # (key, unit) -> see `Meter`

    def __len__(self) -> int:
        """Counters and meters in use."""
        counters = len(self._in_flight) + len(self._running) + len(self._ends)
        return counters + len(self._zero_at)

    def refusal(self, submission: Submission, *, tokens: int) -> SubmitStatus | None:
        """TENANT or RATE, or None if the tenant and the key may submit it."""
        allowance, num_requests = submission.allowance, len(submission.requests)
        in_flight = self._in_flight["tenant", submission.tenant]
        if in_flight + num_requests > self._limits.max_per_tenant:
            return SubmitStatus.TENANT
        if allowance is None:
            return None
        most = allowance.max_in_flight
        if most is not None and self._in_flight["key", allowance.key] + num_requests > most:
            return SubmitStatus.TENANT
        return SubmitStatus.RATE if self.usage(allowance, tokens=tokens).wait else None

    def charge(self, allowance: Allowance) -> RateUsage:
        """See `Queue.charge`."""
        key, limit = allowance.key, allowance.requests_per_minute
        if limit is None:
            return RateUsage()
        wait = self._wait(key, "requests", limit=limit, amount=1)
        if not wait:
            self._add(key, "requests", limit=limit, amount=1)
        return RateUsage(requests=Meter(limit=limit, used=self._used(key, "requests")), wait=wait)

    def usage(self, allowance: Allowance | None, *, tokens: int = 0) -> RateUsage:
        """The key's tokens per minute; `wait` is for a submission of `tokens`."""
        if allowance is None or allowance.tokens_per_minute is None:
            return RateUsage()
        key, limit = allowance.key, allowance.tokens_per_minute
        wait = self._wait(key, "tokens", limit=limit, amount=tokens)
        return RateUsage(tokens=Meter(limit=limit, used=self._used(key, "tokens")), wait=wait)

    def enter(self, submission: Submission, *, tokens: int) -> list[float]:
        """Counts what was admitted. Returns its requests' turns; the least one is next."""
        allowance, num_requests = submission.allowance, len(submission.requests)
        self._in_flight["tenant", submission.tenant] += num_requests
        if allowance is not None:
            self._in_flight["key", allowance.key] += num_requests
            self._add(allowance.key, "tokens", limit=allowance.tokens_per_minute, amount=tokens)
        return [self._turn(submission.tenant, request) for request in submission.requests]

    def begin(self, tenant: str, *, turn: float) -> None:
        """Counts a request that runs for the first time."""
        self._running[tenant] += 1
        self._num_running += 1
        self._latest_turn = max(self._latest_turn, turn)

    def is_below_share(self, tenant: str) -> bool:
        """Whether it has fewer running requests than the tenants in flight on average."""
        return (self._running[tenant] + 1) * len(self._ends) <= self._num_running

    def leave(self, submission: Submission, *, tokens: int, ran: bool) -> None:
        """Counts down a request that ended; `tokens`: used beyond those that admission counted,
        negative if it used fewer.
        """
        tenant, allowance = submission.tenant, submission.allowance
        self._running[tenant] -= ran
        self._num_running -= ran
        self._count_down("tenant", tenant)
        if not self._in_flight["tenant", tenant]:
            del self._ends[tenant], self._running[tenant]
        if not self._ends:
            self._latest_turn = 0.0
        if allowance is not None:
            self._count_down("key", allowance.key)
            self._add(allowance.key, "tokens", limit=allowance.tokens_per_minute, amount=tokens)

    def expire(self) -> None:
        """Drops the meters that are back to zero."""
        now = self._clock()
        self._zero_at = {meter: at for meter, at in self._zero_at.items() if at > now}

    def _turn(self, tenant: str, request: GenerationRequest) -> float:
        turn = max(self._latest_turn, self._ends.get(tenant, 0.0))
        self._ends[tenant] = turn + admission_cost(request)
        return turn

    def _count_down(self, kind: str, name: str) -> None:
        self._in_flight[kind, name] -= 1
        if not self._in_flight[kind, name]:
            del self._in_flight[kind, name]

    def _used(self, key: str, unit: str) -> float:
        return max(0.0, self._zero_at.get((key, unit), 0.0) - self._clock())

    def _wait(self, key: str, unit: str, *, limit: int, amount: int) -> float:
        over = self._used(key, unit) + amount * MINUTE / limit - MINUTE
        return over if over > TOLERANCE else 0.0

    def _add(self, key: str, unit: str, *, limit: int | None, amount: int) -> None:
        if limit is not None:
            used = self._used(key, unit) + amount * MINUTE / limit
            self._zero_at[key, unit] = self._clock() + used
