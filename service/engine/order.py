"""WaitingOrder: which sequence is admitted next. Independent of blocks, batch slots and budgets.

    1. Preempted sequences, in order of arrival: work that was begun is never shed.
    2. The sequence that arrived first, if it was overtaken by `patience` others. (If it is a
       preempted one, `heads` is empty until it is admitted again.) So no sequence waits
       indefinitely: with k older sequences before it, one is admitted after at most
       (k + 1) * (patience + 1) admissions, whatever its priority and tenant.
    3. The lowest priority number that waits; in it the tenant that was served the fewest tokens;
       of that tenant the first to arrive.

Served tokens are counted as in the Virtual Token Counter (Sheng et al., arXiv 2401.00588): the
counter of a tenant that becomes active is raised to that of the least served active tenant, so that
an idle tenant accumulates no credit. A tenant is active while any of its sequences waits or runs.
Counters below that minimum are deleted, which bounds their number.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Generic, Protocol, TypeVar

from service.messages import GenerationRequest


class Waiting(Protocol):
    """What the order depends on. Compared by identity."""

    @property
    def request(self) -> GenerationRequest: ...

    @property
    def tenant(self) -> str: ...

    @property
    def arrival(self) -> int:
        """Rises with each that is added."""
        ...


S = TypeVar("S", bound=Waiting)


class WaitingOrder(Generic[S]):
    """The waiting sequences, and the tokens that their tenants were served."""

    def __init__(self, *, patience: int) -> None:
        self._patience = patience
        self._preempted: list[S] = []
        self._groups: dict[tuple[int, str], deque[S]] = {}  # (priority, tenant), by arrival
        self._served: dict[str, int] = {}
        self._active: Counter[str] = Counter()  # sequences of a tenant, waiting or running
        self._overtaken = 0  # admissions since the first to arrive was the next

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._groups.values()))

    @property
    def num_tenants(self) -> int:
        """Active tenants."""
        return len(self._active)

    def enter(self, sequence: S) -> None:
        """Adds a new sequence."""
        tenant = sequence.tenant
        if not self._active[tenant]:
            floor = self._floor()
            self._served[tenant] = max(self._served.get(tenant, floor), floor)
        self._active[tenant] += 1
        self._groups.setdefault((sequence.request.priority, tenant), deque()).append(sequence)

    def leave(self, sequence: S) -> None:
        """Removes a finished sequence, whether it waited or ran."""
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

    def put_back(self, sequence: S) -> None:
        """Adds a preempted sequence."""
        self._preempted.append(sequence)
        self._preempted.sort(key=_by_arrival)

    def peek(self) -> S | None:
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

    def heads(self) -> list[S]:
        """The next sequence of each waiting tenant, least served tenant first. Empty if a sequence
        was overtaken `patience` times: then only `peek` admits.
        """
        if self._overtaken >= self._patience:
            return []
        found: dict[str, S] = {}
        groups = sorted(self._groups.items())
        for sequence in (*self._preempted, *(group[0] for _, group in groups)):
            found.setdefault(sequence.tenant, sequence)
        return sorted(found.values(), key=lambda each: self._served[each.tenant])

    def admitted(self, sequence: S) -> None:
        """Removes a sequence that now runs."""
        if sequence is self._oldest():
            self._overtaken = 0
        elif sequence not in self._preempted:
            self._overtaken += 1
        self._withdraw(sequence)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Counts tokens served to an active tenant."""
        self._served[tenant] += num_tokens

    def _floor(self) -> int:
        """Tokens of the least served active tenant."""
        return min((self._served[t] for t, num in self._active.items() if num), default=0)

    def _oldest(self) -> S:
        """The waiting sequence that arrived first; there is one."""
        heads = (group[0] for group in self._groups.values())
        return min((*self._preempted, *heads), key=_by_arrival)

    def _first(self) -> S:
        """The first to arrive of the sequences that were never admitted; there is one."""
        return min((group[0] for group in self._groups.values()), key=_by_arrival)

    def _withdraw(self, sequence: S) -> None:
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        key = (sequence.request.priority, sequence.tenant)
        group = self._groups.get(key)
        if group is not None and sequence in group:
            group.remove(sequence)
            if not group:
                del self._groups[key]


def _by_arrival(sequence: Waiting) -> int:
    return sequence.arrival
