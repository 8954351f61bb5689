"""LeasedWork: what a worker keeps of a request that it has claimed. No rules."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.messages import Tokens
from service.queues.contract import Claim, Lease


@dataclass(slots=True)
class LeasedWork:
    """A claimed request. The records are kept to its end, to answer a GAP."""

    claim: Claim
    since: float
    records: list[Tokens] = field(default_factory=list)
    written: int = 0  # tokens that are known to be in the journal
    ending: bool = False  # its end is on its way; the reply decides what became of it

    @property
    def lease(self) -> Lease:
        """Under which its records are written."""
        return self.claim.lease

    @property
    def is_isolated(self) -> bool:
        """Whether it is not yet past the position at which engines died."""
        until = self.claim.isolated_until
        return until is not None and self.written <= until
