"""What the API tells whoever counts, logs or traces. It knows no library for any of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

BUSY = "busy"
"""Why a call is refused for which too many wait: to be parsed, tokenised or shown attention."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCall:
    """One HTTP call that is traced, after its last byte. Traces as the header `traceparent`."""

    trace: str  # the call's own
    parent: str | None  # its caller's
    id: str
    method: str
    route: str | None  # the path's template; None where no route fits
    status: int  # 0: nobody was answered
    duration: float  # seconds


class ApiObserver(Protocol):
    """Called on the event loop; must not block and must not raise."""

    def call_began(self, traceparent: str | None) -> str | None:
        """An HTTP call has come, with its caller's trace if it has one. Returns the call's own,
        which its requests carry on; None: it is not traced.
        """
        ...

    def call_over(self, call: HttpCall) -> None:
        """A traced HTTP call is over."""
        ...

    def call_answered(self, status: int) -> None:
        """An HTTP answer has begun."""
        ...

    def call_accepted(self, requests: int) -> None:
        """A call's requests were admitted to the queue."""
        ...

    def call_refused(self, reason: str) -> None:
        """A limit refused a call; the reason is a `SubmitStatus` of the queue, or BUSY."""
        ...

    def call_unserved(self) -> None:
        """A call was refused because no engine was there."""
        ...

    def call_lost(self, requests: int) -> None:
        """The journal of admitted requests vanished while it was read."""
        ...

    def call_ended(self, report: CallReport) -> None:
        """A generating call is over."""
        ...


class NullObserver:
    """Counts nothing."""

    def call_began(self, traceparent: str | None) -> str | None:  # noqa: ARG002
        """Traces nothing."""
        return None

    def call_over(self, call: HttpCall) -> None:
        """Drops it."""

    def call_answered(self, status: int) -> None:
        """Drops it."""

    def call_accepted(self, requests: int) -> None:
        """Drops it."""

    def call_refused(self, reason: str) -> None:
        """Drops it."""

    def call_unserved(self) -> None:
        """Drops it."""

    def call_lost(self, requests: int) -> None:
        """Drops it."""

    def call_ended(self, report: CallReport) -> None:
        """Drops it."""
