"""QueueObserver: the events that a queue reports. It is independent of any metrics library."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from service.messages import FinishReason
from service.queues.contract import WriteReply, WriteStatus


class QueueEvent(StrEnum):
    """FENCED, DUP, GAP: replies to writes. DROPPED: a malformed record that was discarded.
    RECLAIMED: a request claimed after another engine, dead or draining. OUTAGE: the store could not
    be reached and now it can again.

    CANCELLED, EXPIRED, CRASHED, MALFORMED: ends that the queue wrote itself. All other ends are
    written by a worker.
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
"""The events that are ends, and their reasons."""
STOPPED: dict[FinishReason, QueueEvent] = {
    FinishReason.CANCELLED: QueueEvent.CANCELLED,
    FinishReason.DEADLINE: QueueEvent.EXPIRED,
}
"""The reasons for which a queue stops a request, and their events."""


class QueueObserver:
    """Called from the event loop; must not block and must not raise.

    It ignores all events; subclasses override the methods that they need.
    """

    def happened(self, event: QueueEvent, count: int = 1) -> None:
        """`count` times."""


def report_replies(replies: Iterable[WriteReply], observer: QueueObserver) -> None:
    """Reports the replies to writes that are not OK."""
    for reply in replies:
        if reply.status is not WriteStatus.OK:
            observer.happened(QueueEvent(reply.status.value))
