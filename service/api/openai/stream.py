"""Events: what one record adds to a completion or a chat, as the bytes of a server-sent event.

One event a token is the hot path: everything that does not change is rendered once, and an event is
a few joined byte strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import orjson

from service.api.errors import error_body
from service.api.generation.deltas import Delta, Finish, ScoredToken, Start, StreamDelta
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader
from service.api.openai.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from service.api.openai.usage import usage
from service.api.tools.parser import CallDelta
from service.errors import QuireError
from service.messages import TokenLogprob

DONE = b"data: [DONE]\n\n"
# One newline: a blank line would end an event without data, which openai-python cannot parse.
KEEP_ALIVE = b": ping\n"


class Writer(Protocol):
    """Turns what is shown of an answer into events; knows what it has written so far."""

    def begin(self) -> bytes:
        """What can be said before the journal says anything."""
        ...

    def skip(self, shown: StreamDelta) -> None:
        """Takes note of what the reader was sent before."""
        ...

    def event(self, choice: int, shown: StreamDelta) -> bytes:
        """What `shown` adds."""
        ...

    def finish(self) -> bytes:
        """After all choices."""
        ...

    def fail(self, error: QuireError) -> bytes:
        """An error in mid-stream; nothing comes after it."""
        ...


class EventWriter:
    """Renders one answer's events; with ids, each token event carries the position after it."""

    def __init__(self, answer: AnswerReader, *, event_ids: bool) -> None:
        manifest = answer.manifest
        self._answer = answer
        self._event_ids = event_ids
        self._chat = manifest.endpoint is Endpoint.CHAT
        self._tools = manifest.notation is not None
        head = orjson.dumps({
            "id": answer_id(answer),
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": manifest.created,
            "model": manifest.model,
            "system_fingerprint": manifest.fingerprint,
        })  # fmt: skip
        self._head = b"data: " + head[:-1] + b',"choices":['
        inner = b',"delta":{"content":' if self._chat else b',"text":'
        self._starts = [
            self._head + b'{"index":%d' % choice + inner for choice in range(manifest.num_choices)
        ]
        self._after_text = b"}" if self._chat else b""

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def skip(self, shown: StreamDelta) -> None:
        """Nothing to note: all that an event depends on is the answer's position."""

    def fail(self, error: QuireError) -> bytes:
        """The error, as it would have been a body."""
        return b"data: " + error_body(error) + b"\n\n"

    def event(self, choice: int, shown: StreamDelta) -> bytes:
        """One event: `shown` as a chunk of the answer."""
        if isinstance(shown, Delta):
            event_id = b"id: %s\n" % self._answer.position.encode() if self._event_ids else b""
            ids = b""
            if self._answer.manifest.return_token_ids:
                ids = b',"token_ids":' + orjson.dumps(shown.ids)
            text = self._text(shown.text)
            if shown.calls:
                text += b',"tool_calls":' + orjson.dumps([call_chunk(c) for c in shown.calls])
            text += self._after_text
            return event_id + self._chunk(choice, text, shown.scored, rest=ids)
        if isinstance(shown, Start):
            return self._opening(choice, shown)
        return self._ending(choice, shown)

    def finish(self) -> bytes:
        """After all choices: the token counts where asked for, and the end of the stream."""
        if not self._answer.manifest.include_usage:
            return DONE
        counts = orjson.dumps(usage(self._answer.manifest, self._answer.readers))
        return self._head + b'],"usage":' + counts + b"}\n\n" + DONE

    def _opening(self, choice: int, opening: Start) -> bytes:
        text = self._text(opening.text)
        about = prompt_fields(self._answer, opening.prompt_ids, opening.prompt_logprobs)
        fields = b"," + orjson.dumps(about)[1:-1] if about else b""
        if not self._chat:
            return self._chunk(choice, text, opening.scored, rest=fields)
        text += b',"role":"assistant"}'
        # A chat has one prompt: it is told of once, beside the choices.
        beside = fields if choice == 0 else b""
        return self._chunk(choice, text, opening.scored, rest=b"", beside=beside)

    def _ending(self, choice: int, ending: Finish) -> bytes:
        reason = orjson.dumps(ending.finish_reason)
        rest = b',"stop_reason":' + orjson.dumps(ending.end.stopped_by)
        if ending.text:  # in the same event as the end: one that came back would get it again
            start = self._starts[choice] + orjson.dumps(ending.text) + b'},"logprobs":null'
        elif self._chat:
            start = self._head + b'{"index":%d,"delta":{},"logprobs":null' % choice
        else:
            start = self._starts[choice] + b'"","logprobs":null'
        return start + b',"finish_reason":' + reason + rest + b"}]" + self._counts()

    def _text(self, text: str) -> bytes:
        """Where there are tools, no content is null, as it is in the whole answer."""
        return b"null" if self._tools and not text else orjson.dumps(text)

    def _chunk(
        self,
        choice: int,
        text: bytes,
        scored: tuple[ScoredToken, ...],
        *,
        rest: bytes,
        beside: bytes = b"",
    ) -> bytes:
        """`rest` are more fields of the choice, `beside` of the chunk."""
        logprobs = b"null"
        if scored:
            shape = chat_logprobs if self._chat else completion_logprobs
            logprobs = orjson.dumps(shape(scored, self._answer.context.tokenizer))
        return b"".join((
            self._starts[choice], text, b',"logprobs":', logprobs, b',"finish_reason":null', rest,
            b"}]", beside, self._counts(),
        ))  # fmt: skip

    def _counts(self) -> bytes:
        manifest = self._answer.manifest
        if manifest.continuous_usage:
            counts = usage(manifest, self._answer.readers)
            return b',"usage":' + orjson.dumps(counts) + b"}\n\n"
        return b',"usage":null}\n\n' if manifest.include_usage else b"}\n\n"


def call_chunk(delta: CallDelta) -> dict[str, Any]:
    """What is new of a tool call, in OpenAI's shape."""
    function = {"arguments": delta.arguments}
    if delta.id is None:
        return {"index": delta.index, "function": function}
    function = {"name": delta.name or ""} | function
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


def prompt_fields(
    answer: AnswerReader, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
) -> dict[str, Any]:
    """What is told of a prompt besides the answer: vLLM's fields, where they were asked for."""
    fields: dict[str, Any] = {}
    if answer.manifest.return_token_ids:
        fields["prompt_token_ids"] = ids
    if answer.manifest.prompt_logprobs is not None:
        fields["prompt_logprobs"] = prompt_logprobs(ids, logprobs, answer.context.tokenizer)
    return fields


def answer_id(answer: AnswerReader) -> str:
    """The `id` field, with OpenAI's prefix for the endpoint."""
    prefix = "chatcmpl" if answer.manifest.endpoint is Endpoint.CHAT else "cmpl"
    return f"{prefix}-{answer.id}"
