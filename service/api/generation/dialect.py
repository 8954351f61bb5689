"""Dialect: one client API (OpenAI's chat completions, Anthropic's messages, ...).

    body --parse--> Generation -> prompts, plan, submit -> journal -> AnswerReader
                                                   events <--stream--|--collect--> body

A dialect knows JSON fields and event names. Everything between is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from service.api.generation.deltas import Accumulator, StreamDelta
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader
from service.api.generation.request import Generation
from service.api.http.errors import FieldNames
from service.errors import QuireError

# One newline: a blank line would end an event without data, which openai-python cannot parse.
COMMENT = b": ping\n"

Body_contra = TypeVar("Body_contra", contravariant=True)


class EventRenderer(Protocol):
    """Renders the events of one stream as bytes of server-sent events; empty bytes: no event.

    `skip` is called for the deltas that a resuming client has already, before anything else; then
    `begin`, `event` for each delta, and `finish` or `fail`.
    """

    keep_alive: bytes  # sent after a time without events, between two of them

    def skip(self, delta: StreamDelta) -> None:
        """Takes note of a delta that the client has received."""
        ...

    def begin(self) -> bytes:
        """The events before the first delta."""
        ...

    def event(self, choice: int, delta: StreamDelta) -> bytes:
        """The events of one delta. `AnswerReader.position` is the position after it."""
        ...

    def finish(self) -> bytes:
        """The events after all choices have ended."""
        ...

    def fail(self, error: QuireError) -> bytes:
        """The last event of a stream that fails or is interrupted."""
        ...


class Dialect(Protocol[Body_contra]):
    """One entry of the table `service.api.DIALECTS`."""

    name: Endpoint
    path: str  # of its endpoints; errors of this path and those below it have its form
    names: FieldNames  # of its fields, for error messages
    id_headers: Sequence[bytes]  # more response headers with the request id

    def parse(self, body: Body_contra) -> Generation:
        """The request of a validated body. Raises BadRequest for conflicting fields."""
        ...

    def stream(self, reader: AnswerReader, *, event_ids: bool) -> EventRenderer:
        """A renderer for the answer from its beginning. With `event_ids`, each delta's last event
        has an SSE id: the position after the delta.
        """
        ...

    def collect(self, reader: AnswerReader, choices: Sequence[Accumulator]) -> bytes:
        """The answer as one JSON body, of all choices that were generated. An answer with a status
        (see `Manifest.has_status`) may be incomplete.
        """
        ...

    def error(self, error: QuireError) -> bytes:
        """The body of an error response, in ASCII."""
        ...
