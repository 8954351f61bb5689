"""The events that the API reports for metrics, logs and traces. It uses no library for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

BUSY = "busy"
"""Reason for rejecting a call: too much work waits for parsing, tokenising or attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallReport:
    """One generating call that ended, or whose client left. Times in seconds."""

    id: str
    tenant: str
    endpoint: str
    outcome: str  # the finish reasons, sorted and joined by "+"; "left"; or an error code
    streamed: bool
    prompt_tokens: int
    completion_tokens: int
    to_first_token: float | None  # from arrival; None if there was no token
    duration: float  # from arrival to the last byte


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCall:
    """One traced HTTP call, after its last byte. Traces are in the form of `traceparent`."""

    trace: str  # the call's own
    parent: str | None  # its caller's
    id: str
    method: str
    route: str | None  # the path's template; None if no route matches
    status: int  # 0: no response was sent
    duration: float  # seconds


class ApiObserver(Protocol):
    """Called on the event loop; must not block and must not raise."""

    def call_began(self, traceparent: str | None) -> str | None:
        """An HTTP call arrived, with its caller's trace if there is one. Returns the call's own
        trace, which its requests continue; None if it is not traced.
        """
        ...

    def call_over(self, call: HttpCall) -> None:
        """A traced HTTP call ended."""
        ...

    def call_answered(self, status: int) -> None:
        """An HTTP response began."""
        ...

    def call_accepted(self, requests: int) -> None:
        """A call's requests were admitted to the queue."""
        ...

    def call_refused(self, reason: str) -> None:
        """A call was rejected by a limit; the reason is a `SubmitStatus` of the queue, or BUSY."""
        ...

    def call_unserved(self) -> None:
        """A call was rejected because no engine was available."""
        ...

    def call_lost(self, requests: int) -> None:
        """The journal of admitted requests vanished while it was being read."""
        ...

    def call_ended(self, report: CallReport) -> None:
        """A generating call ended."""
        ...


class NullObserver:
    """Ignores all events."""

    def call_began(self, traceparent: str | None) -> str | None:  # noqa: ARG002
        return None

    def call_over(self, call: HttpCall) -> None: ...

    def call_answered(self, status: int) -> None: ...

    def call_accepted(self, requests: int) -> None: ...

    def call_refused(self, reason: str) -> None: ...

    def call_unserved(self) -> None: ...

    def call_lost(self, requests: int) -> None: ...

    def call_ended(self, report: CallReport) -> None: ...
