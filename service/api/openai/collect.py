"""Completions and chat completions as one JSON body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from service.api.generation.accumulate import Accumulator, ToolCallSegment
from service.api.generation.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader, Usage
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
