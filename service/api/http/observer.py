"""ApiObserver: receives the events of the HTTP API. Independent of any metrics library."""

from __future__ import annotations

from dataclasses import dataclass

BUSY = "busy"
"""Why a call is refused if too many wait to be parsed, tokenized or shown attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallReport:
    """One generating call that was followed to its end or abandoned. Times in seconds."""

    id: str
    tenant: str
    model: str  # its name, as the server has it
    endpoint: str
    outcome: str  # finish reasons, sorted and joined by "+"; "left"; or an error's code
    streamed: bool
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompts, found in the prefix cache by their first choices
    repeats: bool = False  # the answer of an earlier call, read again
    to_first_token: float | None  # from arrival; None if no token came
    duration: float  # from arrival to the last byte


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCall:
    """One traced HTTP call, after its last byte."""

    trace: str  # what `call_began` returned
    id: str
    method: str
    route: str | None  # the path's template; None if no route matches
    status: int  # 0 if no response was sent


class ApiObserver:
    """Called on the event loop; must not block and must not raise.

    It ignores all events; subclasses override the methods that they need.
    """

    def call_began(self, traceparent: str | None) -> str | None:
        """An HTTP call has arrived, with its caller's `traceparent` if it has one.

        Returns the call's own `traceparent`, which its requests carry; None: it is not traced.
        """

    def call_over(self, call: HttpCall) -> None:
        """A traced HTTP call is over."""

    def call_answered(self, status: int) -> None:
        """An HTTP response has begun."""

    def call_accepted(self, requests: int, model: str) -> None:
        """A call's requests were admitted to the queue."""

    def call_refused(self, reason: str) -> None:
        """A limit refused a call; the reason is a `SubmitStatus` of the queue, "rate" or BUSY."""

    def call_unserved(self, model: str) -> None:
        """A call was refused because no engine of the model is available."""

    def call_lost(self, requests: int, model: str) -> None:
        """The journal of admitted requests vanished while it was read."""

    def call_ended(self, report: CallReport) -> None:
        """A generating call is over."""
