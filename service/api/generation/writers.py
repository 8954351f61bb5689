"""Which writer renders whose events."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from service.api.anthropic.object import message_object
from service.api.anthropic.stream import MessageWriter
from service.api.generation.accumulate import Accumulator
from service.api.generation.dialect import EventRenderer
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader
from service.api.openai.collect import collect
from service.api.openai.stream import ChunkRenderer
from service.api.responses.object import response_object, status_of
from service.api.responses.stream import ResponseRenderer


def writer_of(answer: AnswerReader, *, event_ids: bool) -> EventRenderer:
    """The writer for an answer's endpoint, at the answer's beginning."""
    if answer.manifest.endpoint is Endpoint.RESPONSES:
        return response_writer(answer, event_ids=event_ids)
    if answer.manifest.endpoint is Endpoint.MESSAGES:
        return MessageWriter(answer, event_ids=event_ids)
    return ChunkRenderer(answer, event_ids=event_ids)


def response_writer(
    answer: AnswerReader, *, event_ids: bool, seen: int | None = None
) -> ResponseRenderer:
    """The writer for a response; `seen` is the number of the last event that its reader has."""
    return ResponseRenderer(answer, event_ids=event_ids, seen=seen)


def body_of(answer: AnswerReader, choices: Sequence[Accumulator]) -> bytes:
    """The body of an answer."""
    if answer.manifest.endpoint is Endpoint.RESPONSES:
        response = response_object(answer, choices[0], status=status_of(choices[0]))
        return orjson.dumps(response)
    if answer.manifest.endpoint is Endpoint.MESSAGES:
        return orjson.dumps(message_object(answer, choices[0]))
    return collect(answer, choices)
