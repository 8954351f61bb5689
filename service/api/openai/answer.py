"""Completions and chat completions as one JSON body, and as the events of a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import orjson

from service.api.generation.deltas import (
    Accumulator,
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
    manifest, chat = reader.manifest, is_chat(reader)
    content = {"message": _message(reader, choice)} if chat else {"text": choice.text}
    fields: Json = {
        "index": index,
        **content,
        "logprobs": None if manifest.logprobs is None else _logprobs(reader, choice.scored),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.end and choice.end.stopped_by,
    }
    if manifest.return_token_ids:
        fields["token_ids"] = choice.ids
    return fields if chat else fields | _prompt_fields(reader, choice)


def _message(reader: AnswerReader, choice: Accumulator) -> Json:
    message: Json = {
        "role": "assistant", "content": _content(reader, choice.text), "refusal": None,
        **_reasoning_fields(choice.reasoning),
    }  # fmt: skip
    if choice.calls:
        message["tool_calls"] = [_call(call) for call in choice.calls]
    return message | {"annotations": []}


def _content(reader: AnswerReader, text: str) -> str | None:
    """Empty content is null if the answer can have something else: tool calls or reasoning."""
    manifest = reader.manifest
    nullable = manifest.notation is not None or manifest.reasoning is not None
    return None if nullable and not text else text


def _reasoning_fields(text: str) -> Json:
    """Reasoning under the names that clients know: DeepSeek's and OpenRouter's."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _logprobs(reader: AnswerReader, scored: Sequence[ScoredToken]) -> Json:
    shape = chat_logprobs if is_chat(reader) else completion_logprobs
    return shape(scored, reader.context.tokenizer, as_ids=reader.manifest.tokens_as_ids)


def _call(call: ToolCallSegment) -> Json:
    kind, field = ("custom", "input") if call.custom else ("function", "arguments")
    return {"id": call.id, "type": kind, kind: {"name": call.name, field: call.text}}


def _prompt_fields(reader: AnswerReader, choice: Accumulator) -> Json:
    return prompt_fields(reader, choice.prompt_ids, choice.prompt_logprobs)


DONE = b"data: [DONE]\n\n"
OBFUSCATION_BLOCK = 64  # bytes; a chunk is padded to a multiple of it


class ChunkRenderer:
    """Renders one answer's events. With ids, each token event has the position after it."""

    keep_alive = COMMENT

    def __init__(self, reader: AnswerReader, *, event_ids: bool) -> None:
        self._reader = reader
        self._event_ids = event_ids
        self._chat = is_chat(reader)
        self._noise = hashlib.sha512(reader.id.encode()).hexdigest()
        self._head: Json = {
            "id": answer_id(reader),
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": reader.manifest.created,
            "model": reader.manifest.model,
            **tier_field(reader),
        }

    def skip(self, delta: StreamDelta) -> None:
        """Nothing to note: an event depends on the reader's position alone."""

    def begin(self) -> bytes:
        """No event."""
        return b""

    def event(self, choice: int, delta: StreamDelta) -> bytes:
        """One chunk, or none."""
        if isinstance(delta, Start):
            return self._start(choice, delta)
        if isinstance(delta, Finish):
            return self._finish(choice, delta)
        event_id = b"id: %s\n" % self._reader.position.encode() if self._event_ids else b""
        content = self._text(delta.text, delta.reasoning)
        if delta.calls:
            content["tool_calls"] = [_call_chunk(call) for call in delta.calls]
        rest: Json = {"finish_reason": None}
        if self._reader.manifest.return_token_ids:
            rest["token_ids"] = delta.ids
        return event_id + self._chunk(choice, content, rest, delta.scored)

    def finish(self) -> bytes:
        """The token counts, if they were requested, and the end of the stream."""
        if not self._reader.manifest.include_usage:
            return DONE
        usage = usage_object(self._reader.usage)
        return _data(self._with_choices(0, []) | {"usage": usage}) + DONE

    def fail(self, error: QuireError) -> bytes:
        """The error's body as an event."""
        return b"data: " + error_body(error) + b"\n\n"

    def _start(self, choice: int, start: Start) -> bytes:
        manifest = self._reader.manifest
        about = prompt_fields(self._reader, start.prompt_ids, start.prompt_logprobs)
        content, rest = self._text(start.text), {"finish_reason": None}
        if not self._chat:
            if not (manifest.echo or manifest.gives_prompt):
                return b""
            return self._chunk(choice, content, rest | about, start.scored)
        content |= {"role": "assistant", "refusal": None}
        # A chat has one prompt: its fields come once, next to the choices.
        return self._chunk(choice, content, rest, start.scored, more=None if choice else about)

    def _finish(self, choice: int, finish: Finish) -> bytes:
        content: Json = {} if self._chat else {"text": ""}
        if finish.text or finish.reasoning:  # in the last event: a resumed stream would repeat it
            content = self._text(finish.text, finish.reasoning)
        ended = {"finish_reason": finish.finish_reason, "stop_reason": finish.end.stopped_by}
        return self._chunk(choice, content, ended)

    def _text(self, text: str, reasoning: str = "") -> Json:
        if not self._chat:
            return {"text": text}
        return {"content": _content(self._reader, text), **_reasoning_fields(reasoning)}

    def _with_choices(self, choice: int, choices: list[Json]) -> Json:
        """The engines of two choices may be of different numeric classes; each choice's is known
        since its first record.
        """
        fingerprint = self._reader.fingerprint(choice)
        return {**self._head, "system_fingerprint": fingerprint, "choices": choices}

    def _chunk(
        self,
        choice: int,
        content: Json,
        rest: Json,
        scored: Sequence[ScoredToken] = (),
        *,
        more: Json | None = None,
    ) -> bytes:
        """`rest` are the last fields of the choice, `more` are fields of the chunk."""
        manifest = self._reader.manifest
        shown = {"delta": content} if self._chat else content
        logprobs = _logprobs(self._reader, scored) if scored else None
        fields = {"index": choice, **shown, "logprobs": logprobs, **rest}
        chunk = self._with_choices(choice, [fields]) | (more or {})
        if manifest.obfuscation:
            # Makes the size up to here a multiple of a block. A function of the answer's id and of
            # the chunk, so that a resumed stream has the same bytes.
            size = len(_data(chunk)) - len(b"}\n\n")
            chunk["obfuscation"] = self._noise[: -size % OBFUSCATION_BLOCK]
        if manifest.continuous_usage:
            chunk["usage"] = usage_object(self._reader.usage)
        elif manifest.include_usage:
            chunk["usage"] = None
        return _data(chunk)


def _data(chunk: Json) -> bytes:
    return b"data: %s\n\n" % orjson.dumps(chunk)


def _call_chunk(delta: CallDelta) -> dict[str, Any]:
    """The new part of a tool call."""
    kind, field = ("custom", "input") if delta.custom else ("function", "arguments")
    content = {field: delta.arguments}
    if delta.id is None:
        return {"index": delta.index, kind: content}
    named = {"name": delta.name or ""} | content
    return {"index": delta.index, "id": delta.id, "type": kind, kind: named}
