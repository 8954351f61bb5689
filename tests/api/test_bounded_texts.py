"""Texts of a body: each is bounded by a number of characters, or by what it becomes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.api.anthropic.schema import CountBody, MessageBody
from service.api.openai.schema import ChatBody, CompletionBody
from service.api.responses.schema import ResponseBody
from service.api.system.attention import AttentionBody
from service.api.system.models import DetokenizeBody, TokenizeBody

BODIES = (
    CompletionBody, ChatBody, ResponseBody, MessageBody, CountBody, TokenizeBody, DetokenizeBody,
    AttentionBody,
)  # fmt: skip
OF_THE_PROMPT = {
    "prompt", "decoder_prompt", "content", "text", "input", "instructions", "system",
    "description", "arguments", "output", "reasoning_content", "reasoning", "thinking", "refusal",
}  # fmt: skip
OF_THE_GRAMMAR = {"regex", "choice", "grammar", "json", "definition"}
OTHERS = {
    "model": "compared with the one name that is served",
    "encrypted_content": "dropped",
    "signature": "dropped",
    "data": "dropped",
    "stop": "by the configured limits",
    "stop_sequences": "by the configured limits",
    "bad_words": "by the configured limits",
}
BOUNDS = {"maxLength", "enum", "const", "pattern"}


def free_texts(schema: Any, name: str) -> Iterator[str]:
    """The names of properties that may be a string of any length; metadata aside."""
    if isinstance(schema, list):
        for item in schema:
            yield from free_texts(item, name)
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "string" and not BOUNDS & schema.keys():
        yield name
    for key, inner in schema.items():
        if key in {"properties", "$defs"}:
            for each, value in inner.items():
                yield from free_texts(value, each)
        elif key not in {"propertyNames", "default", "examples"}:
            yield from free_texts(inner, name)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_a_text_is_bounded_or_becomes_prompt_or_grammar(body: Any) -> None:
    """A field `user` of 3.9 MB was stored with the answer for the resume window."""
    found = set(free_texts(body.model_json_schema(), body.__name__))
    assert found <= OF_THE_PROMPT | OF_THE_GRAMMAR | OTHERS.keys()


def test_the_walk_sees_a_free_text() -> None:
    found = set(free_texts(ChatBody.model_json_schema(), "ChatBody"))
    assert {"content", "regex", "model"} <= found
    assert not {"user", "name", "metadata", "tool_call_id"} & found


R = {"model": "tiny-model", "input": "hi", "max_output_tokens": 16}
SCHEMA = {"type": "object", "description": "x" * 2000}
ECHOED: dict[str, dict[str, Any]] = {
    "tools": {
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}], "tool_choice": "none",
    },
    "text": {"text": {"format": {"type": "text", "description": "x" * 2000}}},
    "instructions": {"instructions": "\n" * 600},
}  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), ECHOED.items(), ids=ECHOED)
async def test_what_a_response_repeats_is_bounded(
    start_service: Any, small_limits: Any, name: str, fields: Any
) -> None:
    """Also if it becomes neither prompt nor grammar, such as tools that may not be called."""
    async with start_service(limits=small_limits(max_echoed_bytes=1000)) as service:
        reply = await service.post("/v1/responses", R | fields)
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, name), error
        assert error["code"] == "string_above_max_length"
        assert error["message"] == f"{name} may have at most 1000 bytes as JSON"


async def test_limits_themselves_are_allowed(service: Any) -> None:
    """As OpenAI states them."""
    metadata = {f"{index:064}": "é" * 512 for index in range(16)}
    fields = {"user": "é" * 512, "metadata": metadata, "safety_identifier": "x" * 64}
    reply = await service.post("/v1/responses", R | fields)
    assert reply.status_code == 200, reply.text
    assert (reply.json()["user"], reply.json()["metadata"]) == (fields["user"], metadata)
    chat = {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    assert (await service.post("/v1/chat/completions", chat | fields)).status_code == 200


async def test_anthropic_s_user_id_is_bounded(service: Any) -> None:
    body = {
        "model": "tiny-model", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}],
    }  # fmt: skip
    for length, status in ((512, 200), (513, 400)):
        reply = await service.post("/v1/messages", body | {"metadata": {"user_id": "x" * length}})
        assert reply.status_code == status
    assert reply.json()["error"]["message"] == ("metadata.user_id may have at most 512 characters")
