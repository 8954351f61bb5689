"""Fields of POST /v1/responses that agents send, and the fields that its answers always have."""

from __future__ import annotations

from typing import Any

import pytest

from service.api.responses.items import InputReasoning, seal, unseal
from service.messages import FinishReason

B: dict[str, Any] = {"input": "hello", "max_output_tokens": 4, "seed": 3}
URL = "/v1/responses"

REQUIRED = {
    "background", "completed_at", "created_at", "error", "frequency_penalty", "id",
    "incomplete_details", "instructions", "max_output_tokens", "max_tool_calls", "metadata",
    "model", "object", "output", "parallel_tool_calls", "presence_penalty",
    "previous_response_id", "prompt_cache_key", "reasoning", "safety_identifier", "service_tier",
    "status", "store", "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p",
    "truncation", "usage",
}  # fmt: skip
"""Those that the Open Responses specification requires of a response."""

ECHOED: dict[str, Any] = {
    "frequency_penalty": 0.5, "presence_penalty": -0.5, "max_tool_calls": 3,
    "prompt_cache_key": "k", "safety_identifier": "s", "metadata": {"a": "b"},
    "reasoning": {"effort": "high", "summary": "auto"},
    "text": {"format": {"type": "text"}, "verbosity": "low"},
}  # fmt: skip
IGNORED: dict[str, Any] = {
    "client_metadata": {"installation": "x"}, "service_tier": "flex",
    "stream_options": {"include_obfuscation": True}, "prompt_cache_retention": "24h",
    "include": ["reasoning.encrypted_content", "web_search_call.action.sources"],
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_has_every_required_field(
    service: Any, read_events: Any, *, stream: bool
) -> None:
    service.engine.end = FinishReason.STOP
    reply = await service.post(URL, B | ECHOED | IGNORED | {"stream": stream})
    assert reply.status_code == 200
    response = read_events(reply.content)[-1]["response"] if stream else reply.json()
    assert response.keys() >= REQUIRED
    assert {name: response[name] for name in ECHOED} == ECHOED
    assert response["service_tier"] == "default"
    assert type(response["created_at"]) is int
    assert type(response["completed_at"]) is int
    assert response["model"] == "tiny-model"
    plain = (await service.post(URL, B)).json()
    assert plain["reasoning"] == {"effort": None, "summary": None}


async def test_only_a_completed_response_has_a_time_of_completion(service: Any) -> None:
    for end, status in ((FinishReason.STOP, "completed"), (FinishReason.LENGTH, "incomplete")):
        service.engine.end = end
        response = (await service.post(URL, B)).json()
        assert response["status"] == status
        completed = response["completed_at"]
        assert completed is None if end is not FinishReason.STOP else completed >= 1_700_000_000


async def test_hosted_tools_are_dropped_with_a_warning(start_service: Any) -> None:
    function = {"type": "function", "name": "now"}
    hosted: list[dict[str, Any]] = [
        {"type": "web_search", "filters": {"allowed_domains": ["x.example"]}},
        {"type": "web_search_preview_2025_03_11"},
        {"type": "mcp", "server_label": "a", "server_url": "https://x.example"},
        {"type": "code_interpreter", "container": {"type": "auto"}},
        {"type": "file_search", "vector_store_ids": ["v"]},
        {"type": "image_generation"},
        {"type": "local_shell"},
    ]
    async with start_service(max_model_len=4096) as service:
        alone = await service.post(URL, B | {"tools": [function]})
        reply = await service.post(URL, B | {"tools": [hosted[0], function, *hosted[1:]]})
        assert "x-quire-warning" not in alone.headers
        warning = reply.headers["x-quire-warning"]
        assert all(tool["type"] in warning for tool in hosted)
        assert reply.json()["tools"] == alone.json()["tools"]
        one, other = service.engine.seen
        assert (one.prompt_ids, one.grammar) == (other.prompt_ids, other.grammar)
        without = await service.post(URL, B | {"tools": hosted, "tool_choice": "auto"})
        assert without.json()["tools"] == []
        refused = await service.post(URL, B | {"tools": hosted, "tool_choice": "required"})
        assert refused.json()["error"]["param"] == "tool_choice"


def test_reasoning_can_be_sent_back_sealed() -> None:
    for text in ("", "plain", "é😀\n" * 50):
        item = InputReasoning(type="reasoning", summary=[], encrypted_content=seal(text))
        assert unseal(seal(text)) == text
        assert item.text == (text or None)
    for foreign in ("gAAAAABo", "quire1.*", "quire1.gA", "quire1.é"):
        assert unseal(foreign) is None
        sent = {"type": "reasoning", "encrypted_content": foreign, "content": None}
        assert InputReasoning.model_validate(sent).text is None
