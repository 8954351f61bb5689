"""Shares: what each tenant may hold of an engine while several compete. It decides nothing.

With k tenants waiting or running, a share is one k-th of the batch slots and one k-th of the
blocks. What a tenant does not use is left to the others; a single tenant may hold everything. In
favour of a tenant below its share, sequences of a tenant over its share are preempted, the youngest
first, until either tenant is at its share; so two tenants never preempt each other in turns. The
first of all sequences is never preempted, so one always makes progress.

A preempted sequence keeps its tokens, and its full blocks stay in the prefix cache until others
need them: what it loses is mostly time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from service.engine.sequence import Sequence


def rank(sequence: Sequence) -> tuple[int, int]:
    """The highest rank is preempted first. It is constant while a sequence runs."""
    return (0 if sequence.preemptions else sequence.request.priority, sequence.arrival)


class Shares:
    """What each tenant holds now. `num_tenants` counts tenants that wait or run."""

    def __init__(
        self, running: list[Sequence], *, num_tenants: int, num_batch_slots: int, num_blocks: int
    ) -> None:
        self._running = running
        self._share = (num_batch_slots / num_tenants, num_blocks / num_tenants)
        self._batch_slots = Counter(sequence.tenant for sequence in running)
        self._blocks: Counter[str] = Counter()
        for sequence in running:
            self._blocks[sequence.tenant] += sequence.num_held

    def covers(self, sequence: Sequence, *, num_blocks: int) -> bool:
        """Whether its tenant stays within its share with this sequence added."""
        batch_slots, blocks = self._share
        return (
            self._batch_slots[sequence.tenant] + 1 <= batch_slots
            and self._blocks[sequence.tenant] + num_blocks <= blocks
        )

    def victim(self, *, priority: int = 0) -> Sequence | None:
        """The sequence to preempt, of a tenant over its share and with at least this priority
        number; None if there is none.
        """
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
        batch_slots, blocks = self._share
        return self._batch_slots[tenant] > batch_slots or self._blocks[tenant] > blocks


def split_evenly(
    sequences: Iterable[Sequence], *, num_tokens: int
) -> Iterator[tuple[Sequence, int]]:
    """Sequences, each with the limit of its tokens in a step of `num_tokens`.

    Tenants get equal parts, those with the fewest pending tokens first; what one does not use goes
    to the others.
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
