"""Which writer renders whose events."""

from __future__ import annotations

from service.api.anthropic.stream import MessageWriter
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader
from service.api.openai.stream import EventWriter, Writer
from service.api.responses.stream import ResponseRenderer


def writer_of(answer: AnswerReader, *, event_ids: bool) -> Writer:
    """The writer for an answer's endpoint, at the answer's beginning."""
    if answer.manifest.endpoint is Endpoint.RESPONSES:
        return response_writer(answer, event_ids=event_ids)
    if answer.manifest.endpoint is Endpoint.MESSAGES:
        return MessageWriter(answer, event_ids=event_ids)
    return EventWriter(answer, event_ids=event_ids)


def response_writer(
    answer: AnswerReader, *, event_ids: bool, seen: int | None = None
) -> ResponseRenderer:
    """The writer for a response; `seen` is the number of the last event that its reader has."""
    return ResponseRenderer(answer, event_ids=event_ids, seen=seen)
