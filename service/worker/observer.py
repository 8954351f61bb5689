"""WorkerObserver: receives what an engine replica does. It knows no metrics library."""

from __future__ import annotations

from typing import Protocol

from service.messages import End
from service.queues.contract import Claim


class WorkerObserver(Protocol):
    """Receives the events of a worker. Called in the event loop."""

    def claimed(self, claim: Claim) -> None:
        """A request came from the queue; it has tokens if an engine had begun it."""
        ...

    def first_token(self, request_id: str) -> None:
        """The first token that this engine made of an answer is in the journal."""
        ...

    def ended(self, end: End, seconds: float) -> None:
        """A request's end is in the journal, `seconds` after its claim."""
        ...

    def let_go(self, claim: Claim, outcome: str, *, written: int, end: End | None = None) -> None:
        """The engine is done with what it claimed: it ended, or was given up. Once per claim.

        `outcome` is the end's reason or the cause; the journal has `written` tokens.
        """
        ...

    def fenced(self) -> None:
        """The queue refused a write: another engine has the lease."""
        ...

    def lease_lost(self, count: int) -> None:
        """Requests were left to other engines, because their leases were not renewed."""
        ...

    def wasted(self, tokens: int, cause: str) -> None:
        """Tokens were computed in vain; `cause` is one of a fixed few."""
        ...

    def wrote(self, seconds: float) -> None:
        """One round trip to the journal took so long."""
        ...
