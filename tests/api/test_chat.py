"""POST /v1/chat/completions: the template, the shape of the answer, and of its stream."""

from __future__ import annotations

from typing import Any

import pytest

C = {
    "model": "tiny-model",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 6,
    "seed": 3,
}


async def ask(service: Any, **fields: Any) -> dict[str, Any]:
    reply = await service.post("/v1/chat/completions", C | fields)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def test_the_answer_is_a_message(service: Any) -> None:
    body = await ask(service)
    (request,) = service.engine.seen
    template = service.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    assert list(request.prompt_ids) == template
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": service.tokenizer.decode(service.engine.script(request)),
                "refusal": None,
                "annotations": [],
            },
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]


async def test_text_parts_are_joined_and_special_tokens_are_text(service: Any) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    await ask(service, messages=[{"role": "user", "content": parts}])
    await ask(service)
    assert service.engine.seen[0].prompt_ids == service.engine.seen[1].prompt_ids
    await ask(service, messages=[{"role": "user", "content": "<|im_end|>"}])
    ids = service.engine.seen[2].prompt_ids
    end = service.tokenizer.apply_chat_template([{"role": "user", "content": ""}])
    special = sum(map(service.tokenizer.is_special, ids))
    assert special == sum(map(service.tokenizer.is_special, end))


async def test_the_default_length_is_all_there_is(service: Any) -> None:
    await ask(service, max_tokens=None)
    (request,) = service.engine.seen
    assert request.max_total_tokens == 256
    await ask(service, max_tokens=None, max_completion_tokens=3)
    await ask(service, max_tokens=3, max_completion_tokens=3)
    assert [r.max_tokens for r in service.engine.seen[1:]] == [3, 3]


async def test_going_on_with_the_last_message(service: Any) -> None:
    messages = [*C["messages"], {"role": "assistant", "content": "the answer"}]  # type: ignore[misc]  # a list
    await ask(service, messages=messages, continue_final_message=True)
    (request,) = service.engine.seen
    assert service.tokenizer.decode(request.prompt_ids).endswith("the answer")


@pytest.mark.parametrize("top", [None, 0, 2])
async def test_logprobs(service: Any, top: int | None) -> None:
    body = await ask(service, logprobs=True, top_logprobs=top)
    (request,) = service.engine.seen
    ids = service.engine.script(request)
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == list(map(service.tokenizer.token_text, ids))
    assert [bytes(entry["bytes"]) for entry in content] == [
        service.tokenizer.token_bytes[token] for token in ids
    ]
    assert [entry["logprob"] for entry in content] == pytest.approx([-token / 7 for token in ids])
    assert {len(entry["top_logprobs"]) for entry in content} == {top or 0}


async def test_a_stream_tells_the_role_once_and_counts_on(service: Any, read_events: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = await service.post(
        "/v1/chat/completions", C | {"stream": True, "stream_options": options}
    )
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-accel-buffering"] == "no"
    assert b"\nid:" not in reply.content
    events = read_events(reply.content)
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 6)


async def test_a_model_without_a_template(service: Any) -> None:
    service.tokenizer.chat_template, template = None, service.tokenizer.chat_template
    try:
        reply = await service.post("/v1/chat/completions", C)
    finally:
        service.tokenizer.chat_template = template
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "chat_not_supported"
