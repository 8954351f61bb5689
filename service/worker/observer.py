"""WorkerObserver: receives the events of a worker. Independent of any metrics library."""

from __future__ import annotations

from service.messages import End
from service.queues.contract import Claim


class WorkerObserver:
    """Called in the event loop; must not block and must not raise.

    It ignores all events; subclasses override the methods that they need.
    """

    def claimed(self, claim: Claim) -> None:
        """A request was claimed; it has tokens if another engine had begun it."""

    def first_token(self, request_id: str) -> None:
        """The first token that this engine generated for a request is in the journal."""

    def ended(self, end: End, seconds: float) -> None:
        """A request's end is in the journal, `seconds` after its claim."""

    def released(self, claim: Claim, outcome: str, *, written: int, end: End | None = None) -> None:
        """The worker is done with a claim: it ended or was given up. Once per claim.

        `outcome` is the finish reason or the cause; the journal has `written` tokens.
        """

    def fenced(self) -> None:
        """The queue rejected a write: another engine has the lease."""

    def lease_lost(self, count: int) -> None:
        """Requests were left to other engines because their leases were not renewed."""

    def wasted(self, tokens: int, cause: str) -> None:
        """Computed tokens were discarded; `cause` is one of `series.WASTE`."""

    def wrote(self, seconds: float) -> None:
        """Duration of one round trip to the journal."""
