"""What the API tells whoever counts or logs. It knows no metrics library and no log format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class CallReport:
    """One generating call that was followed to its end, or left. Times in seconds."""

    id: str
    tenant: str
    endpoint: str
    outcome: str  # the finish reasons met, sorted and joined by "+"; "left"; or an error's code
    streamed: bool
    prompt_tokens: int
    completion_tokens: int
    to_first_token: float | None  # from arrival; None where no token came
    duration: float  # from arrival to the last byte


class ApiObserver(Protocol):
    """Called on the event loop; must not block and must not raise."""

    def call_answered(self, status: int) -> None:
        """An HTTP answer has begun."""
        ...

    def call_accepted(self, requests: int) -> None:
        """A call's requests were admitted to the queue."""
        ...

    def call_refused(self, reason: str) -> None:
        """The queue did not admit a call: `full`, `tenant`, `conflict`."""
        ...

    def call_lost(self, requests: int) -> None:
        """The journal of admitted requests vanished while it was read."""
        ...

    def call_ended(self, report: CallReport) -> None:
        """A generating call is over."""
        ...


class NullObserver:
    """Counts nothing."""

    def call_answered(self, status: int) -> None:
        """Drops it."""

    def call_accepted(self, requests: int) -> None:
        """Drops it."""

    def call_refused(self, reason: str) -> None:
        """Drops it."""

    def call_lost(self, requests: int) -> None:
        """Drops it."""

    def call_ended(self, report: CallReport) -> None:
        """Drops it."""
