"""Completions and chat completions as one JSON body, and as the events of a stream.

One event per token is the hot path: everything that does not change is rendered once, and an event
is a few joined byte strings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import orjson

from service.api.generation.deltas import (
    Accumulator,
    Delta,
    Finish,
    ScoredToken,
    Start,
    StreamDelta,
    ToolCallSegment,
)
from service.api.generation.dialect import COMMENT
from service.api.generation.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader, Usage
from service.api.http.errors import error_body
from service.api.tools.parser import CallDelta
from service.errors import QuireError
from service.messages import TokenLogprob

Json = dict[str, Any]


def answer_id(reader: AnswerReader) -> str:
    """The `id` field, with OpenAI's prefix for the endpoint."""
    return ("chatcmpl-" if is_chat(reader) else "cmpl-") + reader.id


def is_chat(reader: AnswerReader) -> bool:
    """Whether the answer is a chat completion."""
    return reader.manifest.endpoint is Endpoint.CHAT


def usage_object(usage: Usage) -> Json:
    """Token counts."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def may_lack_content(reader: AnswerReader) -> bool:
    """Whether an answer can have something else than content, which is null then."""
    return reader.manifest.notation is not None or reader.manifest.reasoning is not None


def reasoning_fields(text: str) -> Json:
    """Reasoning under the names that clients know: DeepSeek's and OpenRouter's."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def tier_field(reader: AnswerReader) -> Json:
    """`service_tier`, if one was requested."""
    tier = reader.manifest.service_tier
    return {} if tier is None else {"service_tier": tier}


def prompt_fields(
    reader: AnswerReader, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
) -> Json:
    """VLLM's fields about a prompt, if they were requested."""
    fields: Json = {}
    if reader.manifest.return_token_ids:
        fields["prompt_token_ids"] = ids
    if reader.manifest.prompt_logprobs is not None:
        fields["prompt_logprobs"] = prompt_logprobs(ids, logprobs, reader.context.tokenizer)
    return fields


def collect(reader: AnswerReader, choices: Sequence[Accumulator]) -> bytes:
    """The whole answer. Of each prompt's choices the best `keep` are returned."""
    manifest, chat = reader.manifest, is_chat(reader)
    kept = [
        best
        for first in range(0, len(choices), manifest.width)
        for best in _best(choices[first : first + manifest.width], manifest.keep)
    ]
    return orjson.dumps({
        "id": answer_id(reader),
        "object": "chat.completion" if chat else "text_completion",
        "created": manifest.created,
        "model": manifest.model,
        "system_fingerprint": reader.fingerprint(),
        "choices": [_choice(reader, index, choice) for index, choice in enumerate(kept)],
        "usage": usage_object(reader.usage),
        **tier_field(reader),
        # A chat has one prompt: its fields are next to the choices.
        **(_prompt_fields(reader, kept[0]) if chat else {}),
    })  # fmt: skip


def _best(choices: Sequence[Accumulator], keep: int) -> list[Accumulator]:
    """The `keep` choices of the highest mean log probability; all of them keep their order."""
    if keep == len(choices):
        return list(choices)
    return sorted(choices, key=lambda choice: choice.mean_logprob, reverse=True)[:keep]


def _choice(reader: AnswerReader, index: int, choice: Accumulator) -> Json:
    manifest, tokenizer, chat = reader.manifest, reader.context.tokenizer, is_chat(reader)
    logprobs = None
    if manifest.logprobs is not None:
        shape = chat_logprobs if chat else completion_logprobs
        logprobs = shape(choice.scored, tokenizer, as_ids=manifest.tokens_as_ids)
    content = {"message": _message(reader, choice)} if chat else {"text": choice.text}
    fields: Json = {
        "index": index,
        **content,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.end and choice.end.stopped_by,
    }
    if manifest.return_token_ids:
        fields["token_ids"] = choice.ids
    return fields if chat else fields | _prompt_fields(reader, choice)


def _message(reader: AnswerReader, choice: Accumulator) -> Json:
    message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
    if not choice.text and may_lack_content(reader):
        message["content"] = None
    message |= reasoning_fields(choice.reasoning)
    if choice.calls:
        message["tool_calls"] = [_call(call) for call in choice.calls]
    return message | {"annotations": []}


def _call(call: ToolCallSegment) -> Json:
    kind, field = ("custom", "input") if call.custom else ("function", "arguments")
    return {"id": call.id, "type": kind, kind: {"name": call.name, field: call.arguments}}


def _prompt_fields(reader: AnswerReader, choice: Accumulator) -> Json:
    return prompt_fields(reader, choice.prompt_ids, choice.prompt_logprobs)


DONE = b"data: [DONE]\n\n"
OBFUSCATION_BLOCK = 64  # bytes; a chunk is padded to a multiple of it


class ChunkRenderer:
    """Renders one answer's events. With ids, each token event has the position after it."""

    keep_alive = COMMENT

    def __init__(self, reader: AnswerReader, *, event_ids: bool) -> None:
        manifest = reader.manifest
        self._reader = reader
        self._event_ids = event_ids
        self._chat = is_chat(reader)
        self._nullable = may_lack_content(reader)
        self._noise = hashlib.sha512(reader.id.encode()).hexdigest().encode()
        head = orjson.dumps({
            "id": answer_id(reader),
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": manifest.created,
            "model": manifest.model,
            **tier_field(reader),
        })  # fmt: skip
        self._shared_head = b"data: " + head[:-1]
        self._starts: dict[int, bytes] = {}  # by choice: see `_start_of`
        self._before_text = b',"delta":{"content":' if self._chat else b',"text":'
        self._after_text = b"}" if self._chat else b""

    def skip(self, delta: StreamDelta) -> None:
        """Nothing to note: an event depends on the reader's position alone."""

    def begin(self) -> bytes:
        """No event."""
        return b""

    def event(self, choice: int, delta: StreamDelta) -> bytes:
        """One chunk, or none."""
        if isinstance(delta, Delta):
            event_id = b"id: %s\n" % self._reader.position.encode() if self._event_ids else b""
            ids = b""
            if self._reader.manifest.return_token_ids:
                ids = b',"token_ids":' + orjson.dumps(delta.ids)
            text = self._text(delta.text) + _reasoning(delta.reasoning)
            if delta.calls:
                text += b',"tool_calls":' + orjson.dumps([_call_chunk(c) for c in delta.calls])
            text += self._after_text
            return event_id + self._chunk(choice, text, delta.scored, rest=ids)
        if isinstance(delta, Start):
            return self._start(choice, delta)
        return self._finish(choice, delta)

    def finish(self) -> bytes:
        """The token counts, if they were requested, and the end of the stream."""
        if not self._reader.manifest.include_usage:
            return DONE
        return self._head(0) + b'],"usage":' + self._usage() + b"}\n\n" + DONE

    def fail(self, error: QuireError) -> bytes:
        """The error's body as an event."""
        return b"data: " + error_body(error) + b"\n\n"

    def _start(self, choice: int, start: Start) -> bytes:
        manifest = self._reader.manifest
        about = prompt_fields(self._reader, start.prompt_ids, start.prompt_logprobs)
        fields = b"," + orjson.dumps(about)[1:-1] if about else b""
        text = self._text(start.text)
        if not self._chat:
            if not (manifest.echo or manifest.gives_prompt):
                return b""
            return self._chunk(choice, text, start.scored, rest=fields)
        text += b',"role":"assistant","refusal":null}'
        # A chat has one prompt: its fields come once, next to the choices.
        more = fields if choice == 0 else b""
        return self._chunk(choice, text, start.scored, rest=b"", more=more)

    def _finish(self, choice: int, finish: Finish) -> bytes:
        reason = orjson.dumps(finish.finish_reason)
        rest = b',"stop_reason":' + orjson.dumps(finish.end.stopped_by)
        if finish.text or finish.reasoning:  # in the last event: a resumed stream would repeat it
            text = self._text(finish.text) + _reasoning(finish.reasoning)
            start = self._start_of(choice) + text + b'},"logprobs":null'
        elif self._chat:
            start = self._head(choice) + b'{"index":%d,"delta":{},"logprobs":null' % choice
        else:
            start = self._start_of(choice) + b'"","logprobs":null'
        chunk = start + b',"finish_reason":' + reason + rest + b"}]"
        return chunk + self._padding(chunk) + self._end_of_chunk()

    def _head(self, choice: int) -> bytes:
        """Up to the list of choices. The engines of two choices may be of different numeric
        classes; each choice's is known since its first record.
        """
        fingerprint = orjson.dumps(self._reader.fingerprint(choice))
        return self._shared_head + b',"system_fingerprint":' + fingerprint + b',"choices":['

    def _start_of(self, choice: int) -> bytes:
        """Up to the text of an event."""
        start = self._starts.get(choice)
        if start is None:
            start = self._head(choice) + b'{"index":%d' % choice + self._before_text
            self._starts[choice] = start
        return start

    def _text(self, text: str) -> bytes:
        """Empty content may be null, as in the collected body."""
        return b"null" if self._nullable and not text else orjson.dumps(text)

    def _chunk(
        self,
        choice: int,
        text: bytes,
        scored: tuple[ScoredToken, ...],
        *,
        rest: bytes,
        more: bytes = b"",
    ) -> bytes:
        """`rest` are more fields of the choice, `more` of the chunk."""
        logprobs = b"null"
        if scored:
            shape = chat_logprobs if self._chat else completion_logprobs
            tokenizer, as_ids = self._reader.context.tokenizer, self._reader.manifest.tokens_as_ids
            logprobs = orjson.dumps(shape(scored, tokenizer, as_ids=as_ids))
        chunk = b"".join((
            self._start_of(choice), text, b',"logprobs":', logprobs, b',"finish_reason":null', rest,
            b"}]", more,
        ))  # fmt: skip
        return chunk + self._padding(chunk) + self._end_of_chunk()

    def _padding(self, chunk: bytes) -> bytes:
        """Makes the size of a chunk a multiple of a block. A function of the answer's id and of the
        chunk, so that a resumed stream has the same bytes.
        """
        if not self._reader.manifest.obfuscation:
            return b""
        return b',"obfuscation":"%s"' % self._noise[: -len(chunk) % OBFUSCATION_BLOCK]

    def _end_of_chunk(self) -> bytes:
        manifest = self._reader.manifest
        if manifest.continuous_usage:
            return b',"usage":' + self._usage() + b"}\n\n"
        return b',"usage":null}\n\n' if manifest.include_usage else b"}\n\n"

    def _usage(self) -> bytes:
        return orjson.dumps(usage_object(self._reader.usage))


def _reasoning(text: str) -> bytes:
    """The fields of reasoning, after others."""
    return b"," + orjson.dumps(reasoning_fields(text))[1:-1] if text else b""


def _call_chunk(delta: CallDelta) -> dict[str, Any]:
    """The new part of a tool call."""
    kind, field = ("custom", "input") if delta.custom else ("function", "arguments")
    content = {field: delta.arguments}
    if delta.id is None:
        return {"index": delta.index, kind: content}
    named = {"name": delta.name or ""} | content
    return {"index": delta.index, "id": delta.id, "type": kind, kind: named}
