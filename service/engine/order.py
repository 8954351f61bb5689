"""WaitingOrder: who is admitted next. It knows nothing of blocks, seats or budgets.

    1. Preempted sequences, in order of arrival: work that was begun is never shed.
    2. The sequence that arrived first, where `patience` others were admitted over its head. (Where
       it is a preempted one, `heads` makes way for nobody until it is admitted again.) So
       nothing waits for ever: with k older ones before it, a sequence is admitted after at most
       (k + 1) * (patience + 1) admissions, whatever its class and tenant.
    3. The lowest priority class that waits; in it the tenant that was served the fewest tokens;
       of that tenant the first to arrive.

Served tokens are counted as in the Virtual Token Counter (Sheng et al., arXiv 2401.00588): a tenant
that becomes active is lifted to the least served active one, so that nobody saves up a claim by
being away. A tenant is active while any of its sequences waits or runs. Counters that a lift would
overwrite anyway are forgotten, which bounds their number.
"""

from __future__ import annotations

from collections import Counter, deque

from service.engine.sequence import Sequence


class WaitingOrder:
    """The waiting sequences, and what their tenants were served."""

    def __init__(self, *, patience: int) -> None:
        self._patience = patience
        self._preempted: list[Sequence] = []
        self._groups: dict[tuple[int, str], deque[Sequence]] = {}  # (priority, tenant), by arrival
        self._served: dict[str, int] = {}
        self._active: Counter[str] = Counter()  # sequences of a tenant, waiting or running
        self._overtaken = 0  # admissions over the head of the first to arrive

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._groups.values()))

    @property
    def num_tenants(self) -> int:
        """Tenants of whom anything waits or runs."""
        return len(self._active)

    def enter(self, sequence: Sequence) -> None:
        """A new sequence begins to wait."""
        tenant = sequence.tenant
        if not self._active[tenant]:
            floor = self._floor()
            self._served[tenant] = max(self._served.get(tenant, floor), floor)
        self._active[tenant] += 1
        self._groups.setdefault((sequence.request.priority, tenant), deque()).append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A sequence, waiting or running, is over."""
        self._withdraw(sequence)
        self._active[sequence.tenant] -= 1
        if self._active[sequence.tenant]:
            return
        del self._active[sequence.tenant]
        floor = self._floor()
        self._served = {
            tenant: served
            for tenant, served in self._served.items()
            if tenant in self._active or (self._active and served > floor)
        }

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence waits again."""
        self._preempted.append(sequence)
        self._preempted.sort(key=_by_arrival)

    def peek(self) -> Sequence | None:
        """The sequence to admit next."""
        if self._preempted:
            return self._preempted[0]
        if not self._groups:
            return None
        if self._overtaken >= self._patience:
            return self._first()
        return min(
            self._groups.items(),
            key=lambda item: (item[0][0], self._served[item[0][1]], item[1][0].arrival),
        )[1][0]

    def heads(self) -> list[Sequence]:
        """The next of each tenant that waits; of the least served tenant first. None of them where
        somebody was overtaken often enough: then it is `peek`'s turn alone.
        """
        if self._overtaken >= self._patience:
            return []
        found: dict[str, Sequence] = {}
        groups = sorted(self._groups.items())
        for sequence in (*self._preempted, *(group[0] for _, group in groups)):
            found.setdefault(sequence.tenant, sequence)
        return sorted(found.values(), key=lambda each: self._served[each.tenant])

    def admitted(self, sequence: Sequence) -> None:
        """The sequence stops waiting and runs."""
        if sequence is self._oldest():
            self._overtaken = 0
        elif sequence not in self._preempted:
            self._overtaken += 1
        self._withdraw(sequence)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Counts tokens that an active tenant was served."""
        self._served[tenant] += num_tokens

    def _floor(self) -> int:
        """What the least served active tenant was served."""
        return min((self._served[t] for t, num in self._active.items() if num), default=0)

    def _oldest(self) -> Sequence:
        """The first to arrive of all that wait; there is one."""
        heads = (group[0] for group in self._groups.values())
        return min((*self._preempted, *heads), key=_by_arrival)

    def _first(self) -> Sequence:
        """The first to arrive of those that were never admitted; there is one."""
        return min((group[0] for group in self._groups.values()), key=_by_arrival)

    def _withdraw(self, sequence: Sequence) -> None:
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        key = (sequence.request.priority, sequence.tenant)
        group = self._groups.get(key)
        if group is not None and sequence in group:
            group.remove(sequence)
            if not group:
                del self._groups[key]


def _by_arrival(sequence: Sequence) -> int:
    return sequence.arrival
