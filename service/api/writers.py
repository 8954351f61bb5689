"""Which writer renders whose events."""

from __future__ import annotations

from service.api.answer import Answer
from service.api.events import EventWriter, Writer
from service.api.manifest import Endpoint
from service.api.response_events import ResponseWriter


def writer_of(answer: Answer, *, event_ids: bool) -> Writer:
    """The writer for an answer's endpoint, at the answer's beginning."""
    if answer.manifest.endpoint is Endpoint.RESPONSES:
        return ResponseWriter(answer, event_ids=event_ids)
    return EventWriter(answer, event_ids=event_ids)
