"""The events of a streamed response, each with the number that it can be resumed after.

             one message                         with tools or reasoning
    0        created                             created
    1        in_progress                         in_progress
    2, 3     output_item.added, part.added
             3 + t: output_text.delta            2 + 256 t + k: event k of a record
             3 + n + 1 + k: event k of the end   2 + 256 (n + 1) + k: event k of the end

t: tokens up to the end of the record; n: tokens of the answer. A number stands for the tokens that
a client has, not for the events before it: if the store loses the tail of a journal, the engine
writes it again in records of other lengths, and the numbers keep their meaning. A record of an
answer that is one message has one event. Otherwise it has none, one or several, because an item may
be opened, grow and be finished; never 256, because an answer has fewer items than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from service.api.generation.deltas import (
    Accumulator,
    Delta,
    DeltaTracker,
    ReasoningSegment,
    ScoredToken,
    Start,
    StreamDelta,
    TextSegment,
    ToolCallSegment,
)
from service.api.generation.dialect import COMMENT
from service.api.generation.manifest import Manifest
from service.api.generation.reader import AnswerReader
from service.api.responses.object import (
    Status,
    call_names,
    has_summary,
    is_plain,
    item_id,
    item_object,
    item_status,
    logprobs,
    opened_item,
    reasoning_part,
    response_object,
    status_of,
    summary_part,
    text_part,
)
from service.errors import QuireError

Event = tuple[str, dict[str, Any]]  # its type and its fields


@dataclass(frozen=True, slots=True)
class Numbering:
    """From numbers of tokens to numbers of events."""

    first: int  # of a record of no tokens
    stride: int  # numbers per token
    at_end: int  # events after the last token, at most

    def of(self, num_tokens: int) -> int:
        """The number of the first event of the record that ends with this token."""
        return self.first + self.stride * num_tokens

    def tokens_at(self, number: int) -> int:
        """How many tokens a client has that has received the event of this number."""
        return max(0, number - self.first) // self.stride

    def last(self, num_tokens: int) -> int:
        """The highest number that an event of an answer of so many tokens may have."""
        return self.of(num_tokens + 1) + self.at_end - 1


_TEXT = Numbering(first=3, stride=1, at_end=4)
_ITEMS = Numbering(first=2, stride=256, at_end=256)


def numbering(manifest: Manifest) -> Numbering:
    """The numbering of a response."""
    return _TEXT if is_plain(manifest) else _ITEMS


class ResponseRenderer:
    """Renders the events of one response. `seen` is the number of the last one that the client
    has; None: the client has all events of the deltas that are skipped.
    """

    keep_alive = COMMENT

    def __init__(self, reader: AnswerReader, *, event_ids: bool, seen: int | None = None) -> None:
        self._reader = reader
        self._event_ids = event_ids
        self._numbers = numbering(reader.manifest)
        self._is_plain = is_plain(reader.manifest)
        self._has_summary = has_summary(reader.manifest)
        self._partial = seen is not None  # the client may lack events of the last skipped record
        self._missed = b""  # those events
        self._seen = -1 if seen is None else seen
        self._answer = Accumulator()
        self._items = DeltaTracker()
        self._scored: list[ScoredToken] = []  # those of no event yet

    def begin(self) -> bytes:
        """The first event, or what the client lacks of the last skipped record."""
        status = Status.QUEUED if self._reader.manifest.background else Status.IN_PROGRESS
        return self._render([self._state("created", status)], first=0) + self._missed

    def skip(self, delta: StreamDelta) -> None:
        """Takes note of a delta that the client has received, or of which it lacks events."""
        if not self._partial:
            self._seen = self._number + self._numbers.stride - 1
        self._missed += self.event(0, delta)

    def event(self, _choice: int, delta: StreamDelta) -> bytes:
        if isinstance(delta, Start):
            events = [self._state("in_progress", Status.IN_PROGRESS)]
            if self._is_plain:  # the only item is opened before it has text
                self._answer.segments.append(TextSegment())
                events += self._changes()
            return self._render(events, first=1)
        self._answer.add(delta)
        if isinstance(delta, Delta):
            if self._is_plain:
                return self._render_text(delta)
            self._scored += delta.scored
            return self._render(self._changes(), first=self._number, event_id=self._event_id)
        status = status_of(self._answer)
        events = [] if self._is_plain else self._changes()
        events += self._done(self._items.open, item_status(status))
        events.append(self._state(status.value, status, self._answer))
        return self._render(events, first=self._number + self._numbers.stride)

    def finish(self) -> bytes:
        """No event: the one of the final status is the last."""
        return b""

    def fail(self, error: QuireError) -> bytes:
        """The last event of this stream, but not the end of the response."""
        fields: dict[str, str | None] = {
            "code": error.code, "message": error.message, "param": error.param, **error.details(),
        }  # fmt: skip
        number = max(self._number + self._numbers.stride - 1, self._seen)
        # OpenAI's clients raise an exception only if the event has an `error`.
        return _event(("error", {"error": fields, **fields}), number)

    @property
    def _number(self) -> int:
        """The number of the first event of the last record."""
        return self._numbers.of(self._reader.completion_tokens)

    @property
    def _event_id(self) -> bytes:
        return b"id: %s\n" % self._reader.position.encode() if self._event_ids else b""

    def _state(self, name: str, status: Status, answer: Accumulator | None = None) -> Event:
        response = response_object(self._reader, answer or Accumulator(), status=status)
        return f"response.{name}", {"response": response}

    def _changes(self) -> list[Event]:
        """The changes of the open item, and of those that are opened after it."""
        events: list[Event] = []
        for change in self._items.changes(self._answer.segments):
            if change.opens:
                before = change.index - 1 if change.index else None
                events += [*self._done(before, Status.COMPLETED), *self._opened(change.index)]
            if change.text:
                events += self._delta(change.index, change.text)
        return events

    def _opened(self, index: int) -> list[Event]:
        item = {"item": opened_item(self._reader, self._answer, index)}
        place, segment = {"output_index": index}, self._answer.segments[index]
        # Clients have always received the keys in another order without tools.
        added = ("response.output_item.added", item | place if self._is_plain else place | item)
        if isinstance(segment, ToolCallSegment):
            return [added]
        is_reasoning = isinstance(segment, ReasoningSegment)
        part = {**self._place(index), "part": (reasoning_part if is_reasoning else text_part)("")}
        events: list[Event] = [added, ("response.content_part.added", part)]
        if is_reasoning and self._has_summary:
            summary = {**self._summary_place(index), "part": summary_part("")}
            events.append(("response.reasoning_summary_part.added", summary))
        return events

    def _delta(self, index: int, text: str) -> list[Event]:
        place, segment = self._place(index), self._answer.segments[index]
        if isinstance(segment, ToolCallSegment):
            return [(f"response.{_call_content(segment)}.delta", {**place, "delta": text})]
        if isinstance(segment, TextSegment):
            scored, self._scored = logprobs(self._reader, self._scored), []
            return [("response.output_text.delta", {**place, "delta": text, "logprobs": scored})]
        events = [("response.reasoning_text.delta", {**place, "delta": text})]
        if self._has_summary:
            summary = {**self._summary_place(index), "delta": text}
            events.append(("response.reasoning_summary_text.delta", summary))
        return events

    def _done(self, index: int | None, status: Status) -> list[Event]:
        """The last events of an item; None: of no item."""
        if index is None:
            return []
        segment, place = self._answer.segments[index], self._place(index)
        item = item_object(self._reader, self._answer, index, status=status)
        done = ("response.output_item.done", {"output_index": index, "item": item})
        if isinstance(segment, ToolCallSegment):
            content = call_names(segment)[1]
            fields = {**place, "name": segment.name, content: segment.text}
            return [(f"response.{_call_content(segment)}.done", fields), done]
        (part,) = item["content"]
        part_done: Event = ("response.content_part.done", {**place, "part": part})
        if isinstance(segment, ReasoningSegment):
            events: list[Event] = [
                ("response.reasoning_text.done", {**place, "text": segment.text}),
                part_done,
            ]
            return [*events, *self._summary_done(index, segment.text), done]
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        return [("response.output_text.done", {**place, **text}), part_done, done]

    def _summary_done(self, index: int, text: str) -> list[Event]:
        if not self._has_summary:
            return []
        place = self._summary_place(index)
        return [
            ("response.reasoning_summary_text.done", {**place, "text": text}),
            ("response.reasoning_summary_part.done", {**place, "part": summary_part(text)}),
        ]

    def _place(self, index: int) -> dict[str, Any]:
        """The fields of an event that refer to an item, or to the content part of a message."""
        id_ = item_id(self._reader, self._answer, index)
        if isinstance(self._answer.segments[index], ToolCallSegment):
            return {"item_id": id_, "output_index": index}
        return {"item_id": id_, "output_index": index, "content_index": 0}

    def _summary_place(self, index: int) -> dict[str, Any]:
        id_ = item_id(self._reader, self._answer, index)
        return {"item_id": id_, "output_index": index, "summary_index": 0}

    def _render_text(self, delta: Delta) -> bytes:
        """The event of a delta without tools: one per token, also if it has no text."""
        number, kind = self._number, "response.output_text.delta"
        if number <= self._seen:
            return b""
        # Clients have always received the keys in another order than with tools.
        fields = {"type": kind, **self._place(0), "sequence_number": number, "delta": delta.text}
        return self._event_id + _data(
            kind, fields | {"logprobs": logprobs(self._reader, delta.scored)}
        )

    def _render(self, events: list[Event], *, first: int, event_id: bytes = b"") -> bytes:
        """The events that the client has not; the last one has the event id."""
        new = [
            _event(event, number)
            for number, event in enumerate(events, start=first)
            if number > self._seen
        ]
        return b"".join([*new[:-1], event_id, *new[-1:]]) if new else b""


def _call_content(segment: ToolCallSegment) -> str:
    """What the events of a call's content are named after."""
    return "custom_tool_call_input" if segment.custom else "function_call_arguments"


def _event(event: Event, number: int) -> bytes:
    kind, fields = event
    return _data(kind, {"type": kind, "sequence_number": number, **fields})


def _data(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps(fields))
