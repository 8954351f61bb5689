"""The events of a streamed response that has tools, each with the number that it can be resumed
after.

    0 created · 1 in_progress
    2 + 256 t + k          event k of those that a record brings, t tokens with it
    2 + 256 (n + 1) + k    event k of those at the end, n tokens in all

A record brings no event, one, or several: a message or a call may open, grow and be done. It never
brings so many as 256, for an answer holds no more calls than that. As in `response_events`, a
number says what the reader has, and not how many events came before it.
"""

from __future__ import annotations

from typing import Any

import orjson

from service.api.generation.accumulate import ToolCallSegment, Accumulator, DeltaTracker
from service.api.generation.deltas import Finish, Start, StreamDelta
from service.api.generation.reader import AnswerReader
from service.api.responses.items import opened_item, text_part, whole_item
from service.api.responses.object import Status, item_status, response_object, status_of
from service.errors import QuireError

FIRST = 2  # events before any record's
STRIDE = 256  # numbers of one record

Event = tuple[str, dict[str, Any]]


class ResponseItemWriter:
    """Renders one response's events. `seen` is the number of the last one that the reader has;
    None: it has all that is skipped.
    """

    def __init__(self, answer: AnswerReader, *, event_ids: bool, seen: int | None = None) -> None:
        self._answer = answer
        self._event_ids = event_ids
        self._partly = seen is not None  # the reader may have a part of the last record's events
        self._seen = -1 if seen is None else seen
        self._missed = b""  # the other part
        self._collected = Accumulator()
        self._items = DeltaTracker()

    @staticmethod
    def tokens_at(number: int) -> int:
        """How many tokens a reader has who has the event of this number."""
        return max(0, number - FIRST) // STRIDE

    @staticmethod
    def last_number(count: int) -> int:
        """The highest that an event of an answer of so many tokens may have."""
        return FIRST + STRIDE * (count + 2) - 1

    def begin(self) -> bytes:
        """Before the journal has anything; or what is left of a record."""
        background = self._answer.manifest.given_back["background"]
        status = Status.QUEUED if background else Status.IN_PROGRESS
        return self._render([self._state("created", status)], first=0) + self._missed

    def skip(self, shown: StreamDelta) -> None:
        """The reader has this, or a part of it."""
        events = self.event(0, shown)
        if self._partly:
            self._missed += events
        else:
            self._seen = self._number() + STRIDE - 1

    def event(self, _choice: int, shown: StreamDelta) -> bytes:
        """What a record changes, in events."""
        if isinstance(shown, Start):
            return self._render([self._state("in_progress", Status.IN_PROGRESS)], first=1)
        self._collected.add(shown)
        if isinstance(shown, Finish):
            status = status_of(self._collected)
            events = [*self._changes(), *self._done(self._items.open, item_status(status))]
            events.append(self._state(status.value, status, self._collected))
            return self._render(events, first=self._number() + STRIDE)
        events = self._changes()
        event_id = b"id: %s\n" % self._answer.position.encode() if self._event_ids else b""
        return self._render(events, first=self._number(), event_id=event_id)

    def finish(self) -> bytes:
        """Nothing: the last event says that it is the last."""
        return b""

    def fail(self, error: QuireError) -> bytes:
        """The end of this stream, which is not the end of the response."""
        fields: dict[str, str | None] = {
            "code": error.code, "message": error.message, "param": error.param, **error.details(),
        }  # fmt: skip
        number = max(self._number() + STRIDE - 1, self._seen)
        # OpenAI's clients raise for what has an `error`; without it they would take it for text.
        return _event(("error", {"error": fields, **fields}), number)

    def _number(self) -> int:
        """Of the first event of the last record."""
        return FIRST + STRIDE * self._answer.completion_tokens

    def _state(self, name: str, status: Status, collected: Accumulator | None = None) -> Event:
        response = response_object(self._answer, collected or Accumulator(), status=status)
        return f"response.{name}", {"response": response}

    def _changes(self) -> list[Event]:
        """What is new of the open item, and of those that open after it."""
        events: list[Event] = []
        for news in self._items.changes(self._collected.segments):
            if news.opens:
                before = news.index - 1 if news.index else None
                events += [*self._done(before, "completed"), *self._opened(news.index)]
            if news.text:
                events.append(self._delta(news.index, news.text))
        return events

    def _opened(self, index: int) -> list[Event]:
        run = self._collected.segments[index]
        item = opened_item(self._answer, index, run)
        added = ("response.output_item.added", {"output_index": index, "item": item})
        if isinstance(run, ToolCallSegment):
            return [added]
        place = {**self._place(index), "content_index": 0}
        return [added, ("response.content_part.added", {**place, "part": text_part("")})]

    def _delta(self, index: int, new: str) -> Event:
        place = self._place(index)
        if isinstance(self._collected.segments[index], ToolCallSegment):
            return "response.function_call_arguments.delta", {**place, "delta": new}
        fields = {**place, "content_index": 0, "delta": new, "logprobs": []}
        return "response.output_text.delta", fields

    def _done(self, index: int | None, status: str) -> list[Event]:
        """An item, closed; None: there is none."""
        if index is None:
            return []
        run, place = self._collected.segments[index], self._place(index)
        item = whole_item(self._answer, index, run, status=status)
        done = ("response.output_item.done", {"output_index": index, "item": item})
        if isinstance(run, ToolCallSegment):
            told = {**place, "name": run.name, "arguments": run.arguments}
            return [("response.function_call_arguments.done", told), done]
        place["content_index"] = 0
        return [
            ("response.output_text.done", {**place, "text": run.text, "logprobs": []}),
            ("response.content_part.done", {**place, "part": text_part(run.text)}),
            done,
        ]

    def _place(self, index: int) -> dict[str, Any]:
        item = opened_item(self._answer, index, self._collected.segments[index])
        return {"item_id": item["id"], "output_index": index}

    def _render(self, events: list[Event], *, first: int, event_id: bytes = b"") -> bytes:
        """Those that the reader has not; the last one carries the position after the record."""
        new = [
            _event(event, number)
            for number, event in enumerate(events, start=first)
            if number > self._seen
        ]
        return b"".join([*new[:-1], event_id, *new[-1:]]) if new else b""


def _event(event: Event, number: int) -> bytes:
    kind, fields = event
    data = orjson.dumps({"type": kind, "sequence_number": number, **fields})
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)
