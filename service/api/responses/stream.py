"""The events of a streamed response, each with the number that it can be resumed after.

    0 created · 1 in_progress · 2 output_item.added · 3 content_part.added    before the tokens
    3 + t output_text.delta                                                   t tokens so far
    4 + n text.done · 5 + n part.done · 6 + n item.done · 7 + n the end       n tokens in all

A number says how many tokens the reader has, not how many events came before it: a store that lost
a journal's tail gets it again cut in other places, and the numbers still mean the same. So they
grow by one where each record holds one token, which is usual, and by more where it holds more.
"""

from __future__ import annotations

from typing import Any

import orjson

from service.api.generation.accumulate import Accumulator
from service.api.generation.deltas import Finish, Start, Delta, StreamDelta
from service.api.generation.reader import AnswerReader
from service.api.responses.object import (
    Status,
    item_status,
    logprobs,
    message_item,
    opened_item,
    response_object,
    status_of,
    text_part,
)
from service.errors import QuireError

BEFORE_TOKENS = 3  # the number of the last event before them
AFTER_TOKENS = 4  # events after them


class ResponseWriter:
    """Renders one response's events, without those up to number `seen`."""

    def __init__(self, answer: AnswerReader, *, event_ids: bool, seen: int | None = None) -> None:
        self._answer = answer
        self._event_ids = event_ids
        self._seen = -1 if seen is None else seen
        self._collected = Accumulator()
        place = {"item_id": f"msg_{answer.id}", "output_index": 0, "content_index": 0}
        self._place = place
        self._delta = b"event: response.output_text.delta\ndata: " + orjson.dumps(
            {"type": "response.output_text.delta", **place}
        ).removesuffix(b"}")

    @staticmethod
    def tokens_at(number: int) -> int:
        """How many tokens a reader has who has the event of this number."""
        return max(0, number - BEFORE_TOKENS)

    @staticmethod
    def last_number(count: int) -> int:
        """Of the last event of an answer of so many tokens."""
        return BEFORE_TOKENS + count + AFTER_TOKENS

    def begin(self) -> bytes:
        """Before the journal has anything."""
        background = self._answer.manifest.given_back["background"]
        status = Status.QUEUED if background else Status.IN_PROGRESS
        return self._response_event(0, "created", status)

    def skip(self, shown: StreamDelta) -> None:
        """The reader has this."""
        self._collected.add(shown)
        self._seen = max(self._seen, BEFORE_TOKENS + self._answer.completion_tokens)

    def event(self, _choice: int, shown: StreamDelta) -> bytes:
        """What a record changes, in events."""
        self._collected.add(shown)
        if isinstance(shown, Delta):
            return self._text_event(shown)
        return self._opened() if isinstance(shown, Start) else self._ended(shown)

    def finish(self) -> bytes:
        """Nothing: the last event says that it is the last."""
        return b""

    def fail(self, error: QuireError) -> bytes:
        """The end of this stream, which is not the end of the response."""
        fields: dict[str, str | None] = {
            "code": error.code, "message": error.message, "param": error.param, **error.details(),
        }  # fmt: skip
        number = BEFORE_TOKENS + self._answer.completion_tokens
        # OpenAI's clients raise for what has an `error`; without it they would take it for text.
        return self._event(max(number, self._seen), "error", error=fields, **fields)

    def _opened(self) -> bytes:
        place = self._place
        part = text_part(self._answer, Accumulator())
        added = {"item": opened_item(self._answer), "output_index": 0}
        return (
            self._response_event(1, "in_progress", Status.IN_PROGRESS)
            + self._event(2, "response.output_item.added", **added)
            + self._event(3, "response.content_part.added", **place, part=part)
        )

    def _text_event(self, piece: Delta) -> bytes:
        answer = self._answer
        event_id = b"id: %s\n" % answer.position.encode() if self._event_ids else b""
        scored = orjson.dumps(logprobs(answer, piece.scored)) if piece.scored else b"[]"
        number = BEFORE_TOKENS + answer.completion_tokens
        return b"".join((
            event_id, self._delta, b',"sequence_number":%d,"delta":' % number,
            orjson.dumps(piece.text), b',"logprobs":', scored, b"}\n\n",
        ))  # fmt: skip

    def _ended(self, ending: Finish) -> bytes:
        answer, collected, place = self._answer, self._collected, self._place
        end = ending.end
        first = BEFORE_TOKENS + end.count + 1
        status = status_of(collected)
        part = text_part(answer, collected)
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        item = message_item(answer, collected, status=item_status(status))
        return (
            self._event(first, "response.output_text.done", **place, **text)
            + self._event(first + 1, "response.content_part.done", **place, part=part)
            + self._event(first + 2, "response.output_item.done", output_index=0, item=item)
            + self._response_event(first + 3, status.value, status)
        )

    def _response_event(self, number: int, name: str, status: Status) -> bytes:
        if number <= self._seen:
            return b""
        empty = Accumulator() if name in {"created", "in_progress"} else self._collected
        response = response_object(self._answer, empty, status=status)
        return self._event(number, f"response.{name}", response=response)

    def _event(self, number: int, kind: str, **fields: Any) -> bytes:  # noqa: ANN401  # any JSON
        if number <= self._seen and kind != "error":
            return b""
        data = orjson.dumps({"type": kind, "sequence_number": number, **fields})
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)
