"""Shares: what each tenant may hold of an engine while others want it too. It decides nothing.

With k tenants waiting or running, a share is one k-th of the seats and one k-th of the blocks. Who
wants less leaves the rest to others, and alone one may hold all. A tenant over its share gives way
to one below it: its sequences are preempted, the youngest first, until either is at its share, and
so nobody is sent to and fro. The first of all sequences never gives way: there is always one that
goes on, whatever comes.

A sequence that gave way keeps its tokens, and its full blocks can be found again until others need
them: what it loses is mostly time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Run

from service.engine.sequence import Sequence


def rank(sequence: Sequence) -> tuple[int, int]:
    """The greatest is preempted first. It does not change while a sequence runs."""
    return (0 if sequence.preemptions else sequence.request.priority, sequence.arrival)


class Shares:
    """Who holds what now. `num_tenants` are those that wait or run."""

    def __init__(
        self, running: Run[Sequence], *, num_tenants: int, num_seats: int, num_blocks: int
    ) -> None:
        self._running = running
        self._share = (num_seats / num_tenants, num_blocks / num_tenants)
        self._seats = Counter(sequence.tenant for sequence in running)
        self._blocks: Counter[str] = Counter()
        for sequence in running:
            self._blocks[sequence.tenant] += len(sequence.blocks)

    def covers(self, sequence: Sequence, *, num_blocks: int) -> bool:
        """Whether its tenant stays within its share with this one more."""
        seats, blocks = self._share
        return (
            self._seats[sequence.tenant] + 1 <= seats
            and self._blocks[sequence.tenant] + num_blocks <= blocks
        )

    def victim(self, *, priority: int = 0) -> Sequence | None:
        """Who gives way first of those over their share and of no higher class; None: nobody."""
        first = min(self._running, key=rank, default=None)
        over = [
            sequence
            for sequence in self._running
            if self._is_over(sequence.tenant)
            and sequence.request.priority >= priority
            and sequence is not first
        ]
        return max(over, key=rank, default=None)

    def _is_over(self, tenant: str) -> bool:
        seats, blocks = self._share
        return self._seats[tenant] > seats or self._blocks[tenant] > blocks


def split_evenly(
    sequences: Iterable[Sequence], *, num_tokens: int
) -> Iterator[tuple[Sequence, int]]:
    """Sequences and how many of their pending tokens a step of `num_tokens` computes at most.

    Tenants get equal parts; what one leaves goes to the others. Who wants least goes first.
    """
    of_tenant: dict[str, list[Sequence]] = {}
    for sequence in sequences:
        of_tenant.setdefault(sequence.tenant, []).append(sequence)
    groups = sorted(of_tenant.values(), key=lambda group: sum(s.num_pending for s in group))
    for index, group in enumerate(groups):
        part = num_tokens // (len(groups) - index)
        for sequence in group:
            num = min(part, sequence.num_pending)
            part -= num
            num_tokens -= num
            yield sequence, num
