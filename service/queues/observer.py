"""QueueObserver: what a queue tells whoever counts. It knows no metrics library."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from service.messages import FinishReason


class QueueEvent(StrEnum):
    """FENCED, DUP, GAP: replies to writes. DROPPED: a malformed record that was thrown away.
    RECLAIMED: a request taken over from another engine, dead or draining. OUTAGE: the store could
    not be reached and now it can again.

    CANCELLED, EXPIRED, CRASHED, MALFORMED: ends that the queue wrote itself, over the head of an
    engine or without one. All other ends are written by a worker.
    """

    FENCED = "fenced"
    DUP = "dup"
    GAP = "gap"
    DROPPED = "dropped"
    RECLAIMED = "reclaimed"
    OUTAGE = "outage"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    CRASHED = "crashed"
    MALFORMED = "malformed"


REASON_OF_END: dict[QueueEvent, FinishReason] = {
    QueueEvent.CANCELLED: FinishReason.CANCELLED,
    QueueEvent.EXPIRED: FinishReason.DEADLINE,
    QueueEvent.CRASHED: FinishReason.ERROR,
    QueueEvent.MALFORMED: FinishReason.ERROR,
}
"""The events that are ends, and what the ends say."""
STOPPED: dict[FinishReason, QueueEvent] = {
    FinishReason.CANCELLED: QueueEvent.CANCELLED,
    FinishReason.DEADLINE: QueueEvent.EXPIRED,
}
"""The reasons for which a queue stops a request, and the event that tells of it."""


class QueueObserver(Protocol):
    """Called from the event loop; must not block and must not raise."""

    def happened(self, event: QueueEvent, count: int = 1) -> None:
        """`count` times."""
        ...


class NullQueueObserver:
    """Counts nothing."""

    def happened(self, event: QueueEvent, count: int = 1) -> None:
        """Drops the report."""
