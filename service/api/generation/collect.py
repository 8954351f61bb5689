"""An answer as one JSON body: its stream collected, to its end or as far as it goes now."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import orjson

from service.api.anthropic.object import message_object
from service.api.generation.accumulate import Accumulator
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader, failure_of
from service.api.openai.logprobs import chat_logprobs, completion_logprobs
from service.api.openai.stream import answer_id, prompt_fields
from service.api.openai.usage import usage
from service.api.responses.object import response_object, status_of


async def whole_body(answer: AnswerReader) -> bytes:
    """The JSON body. Raises as `Answer.shown` does, and the failure of a response."""
    choices = [Accumulator() for _ in answer.readers]
    async with aclosing(answer.shown()) as batches:
        async for batch in batches:
            for choice, shown in batch:
                choices[choice].add(shown)
    if answer.manifest.endpoint is Endpoint.RESPONSES:
        return _response(answer, choices[0])
    if answer.manifest.endpoint is Endpoint.MESSAGES:
        return orjson.dumps(message_object(answer, choices[0]))
    return _choices(answer, choices)


async def body_now(answer: AnswerReader) -> bytes:
    """A response's JSON body as far as it has come."""
    collected, context = Accumulator(), answer.context
    pages = context.replay.pages(context.queue, answer.request_ids[0], answer.readers[0])
    async with aclosing(pages):
        async for records in pages:
            for _, shown in answer.read_all(0, records):
                collected.add(shown)
    return orjson.dumps(response_object(answer, collected, status=status_of(collected)))


def _response(answer: AnswerReader, collected: Accumulator) -> bytes:
    failure = None if collected.end is None else failure_of(collected.end)
    if failure is not None:
        raise failure
    return orjson.dumps(response_object(answer, collected, status=status_of(collected)))


def _choices(answer: AnswerReader, choices: Sequence[Accumulator]) -> bytes:
    manifest = answer.manifest
    kept = [
        best
        for first in range(0, len(choices), manifest.width)
        for best in _best(choices[first : first + manifest.width], manifest.keep)
    ]
    chat = manifest.endpoint is Endpoint.CHAT
    return orjson.dumps({
        "id": answer_id(answer),
        "object": "chat.completion" if chat else "text_completion",
        "created": manifest.created,
        "model": manifest.model,
        "system_fingerprint": manifest.fingerprint,
        "choices": [_choice(answer, index, choice) for index, choice in enumerate(kept)],
        "usage": usage(manifest, answer.readers),
        # A chat has one prompt, which is told of beside the choices.
        **(_about_prompt(answer, kept[0]) if chat else {}),
    })  # fmt: skip


def _best(choices: Sequence[Accumulator], keep: int) -> list[Accumulator]:
    """The `keep` likeliest in falling order; all of them stay in theirs."""
    if keep == len(choices):
        return list(choices)
    return sorted(choices, key=lambda choice: choice.mean_logprob, reverse=True)[:keep]


def _choice(answer: AnswerReader, index: int, choice: Accumulator) -> dict[str, Any]:
    manifest, tokenizer = answer.manifest, answer.context.tokenizer
    chat = manifest.endpoint is Endpoint.CHAT
    logprobs = None
    if manifest.logprobs is not None:
        logprobs = (chat_logprobs if chat else completion_logprobs)(choice.scored, tokenizer)
    shown = {"message": _message(answer, choice)} if chat else {"text": choice.text}
    fields: dict[str, Any] = {
        "index": index,
        **shown,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.end and choice.end.stopped_by,
    }
    if manifest.return_token_ids:
        fields["token_ids"] = choice.ids
    return fields if chat else fields | _about_prompt(answer, choice)


def _message(answer: AnswerReader, choice: Accumulator) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text}
    if answer.manifest.notation is not None and not choice.text:
        message["content"] = None
    if choice.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in choice.calls
        ]
    return message


def _about_prompt(answer: AnswerReader, choice: Accumulator) -> dict[str, Any]:
    return prompt_fields(answer, choice.prompt_ids, choice.prompt_logprobs)
