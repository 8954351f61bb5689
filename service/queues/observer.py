"""QueueObserver: what a queue tells whoever counts. It knows no metrics library."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol


class QueueEvent(StrEnum):
    """FENCED, DUP, GAP: replies to writes. DROPPED: a malformed record that was thrown away.
    RECLAIMED: a request taken over from another engine, dead or draining. OUTAGE: the store could
    not be reached and now it can again.
    """

    FENCED = "fenced"
    DUP = "dup"
    GAP = "gap"
    DROPPED = "dropped"
    RECLAIMED = "reclaimed"
    OUTAGE = "outage"


class QueueObserver(Protocol):
    """Called from the event loop; must not block and must not raise."""

    def happened(self, event: QueueEvent, count: int = 1) -> None:
        """`count` times."""
        ...


class NullQueueObserver:
    """Counts nothing."""

    def happened(self, event: QueueEvent, count: int = 1) -> None:
        """Drops the report."""
