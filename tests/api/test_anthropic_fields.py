"""POST /v1/messages: what each field of current agents does, and what it leaves as it was."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.api.anthropic.dialect import parse_chat
from service.api.anthropic.schema import CountBody
from service.api.anthropic.tools import CLIENT_TOOLS
from service.api.tools.formats import TOOL_FORMATS
from service.messages import FinishReason

B: dict[str, Any] = {
    "model": "tiny-model",
    "max_tokens": 12,
    "seed": 3,
    "messages": [{"role": "user", "content": "hello"}],
}
TOOL: dict[str, Any] = {"name": "weather", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture
async def service(start_service: Any) -> AsyncIterator[Any]:
    """A replica with room for tools in a prompt."""
    async with start_service(max_model_len=4096) as started:
        yield started


async def sent(service: Any, **fields: Any) -> Any:
    """The reply to a body with these fields."""
    reply = await service.post("/v1/messages", B | fields)
    assert reply.status_code == 200, reply.text
    return reply


async def request_of(service: Any, **fields: Any) -> Any:
    """What the engine gets for a body with these fields."""
    await sent(service, **fields)
    return service.engine.seen[-1]


NO_EFFECT: list[dict[str, Any]] = [
    {"service_tier": "auto"},
    {"service_tier": "standard_only"},
    {"speed": "standard"},
    {"metadata": {"user_id": '{"device_id": "d", "session_id": "s"}'}},
    {"mcp_servers": []},
    {"container": None},
    {"fallbacks": []},
    {"diagnostics": {"previous_message_id": "msg_1"}},
    {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
    {"context_management": {}},
    {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
    {"thinking": {"type": "adaptive"}},
    {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "summarized"}},
    {"thinking": {"type": "disabled"}},
    {"output_config": {"effort": "xhigh"}},
    {"tool_choice": {"type": "auto"}},
]


@pytest.mark.parametrize("fields", NO_EFFECT, ids="-".join)
async def test_fields_without_an_effect_on_this_model_change_nothing(
    service: Any, fields: dict[str, Any]
) -> None:
    """The model of these tests has no reasoning."""
    plain = await request_of(service)
    given = await request_of(service, **fields)
    for name in ("prompt_ids", "grammar", "max_tokens", "stop", "priority"):
        assert getattr(given, name) == getattr(plain, name), name
    assert given.sampling == plain.sampling


async def test_the_headers_and_the_query_of_the_beta_api_are_accepted(service: Any) -> None:
    betas = "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27"
    for path in ("/v1/messages?beta=true", "/v1/messages/count_tokens?beta=true"):
        body = B if "count" not in path else {name: B[name] for name in ("model", "messages")}
        reply = await service.post(path, body, anthropic_beta=betas, anthropic_version="2023-06-01")
        assert reply.status_code == 200, reply.text


async def test_system_messages_may_be_anywhere(service: Any) -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "be kind"}]}
    turns = [*B["messages"], system, {"role": "assistant", "content": "hi"}, *B["messages"]]
    message = await request_of(service, messages=turns)
    chat = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    await service.post("/v1/chat/completions", {"model": "tiny-model", "messages": chat})
    assert message.prompt_ids == service.engine.seen[-1].prompt_ids
    assert "be kind" in service.tokenizer.decode(message.prompt_ids)


def parsed(**fields: Any) -> list[tuple[str, str, str | None]]:
    """Role, text and reasoning of the messages of a body's chat."""
    chat = parse_chat(CountBody.model_validate({"model": "m", "messages": B["messages"]} | fields))
    return [(message.role, message.content, message.reasoning) for message in chat.messages]


def test_a_system_message_is_hidden_after_the_next_message_of_the_user() -> None:
    hidden = {"role": "system", "content": "now", "clear_at": "next_user_message"}
    kept = {"role": "system", "content": "always", "clear_at": "never"}
    user = {"role": "user", "content": "hello"}
    turns = [user, hidden, kept]
    assert parsed(messages=turns)[1:] == [("system", "now", None), ("system", "always", None)]
    assert parsed(messages=[*turns, user])[1:] == [
        ("system", "always", None),
        ("user", "hello", None),
    ]


def test_the_note_of_claude_code_is_no_instruction() -> None:
    note = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.fa0;"}
    text = {"type": "text", "text": "be kind"}
    assert parsed(system=[note, text]) == parsed(system="be kind")
    assert parsed(system=[note]) == parsed()


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({}, 1),
        ({"keep": "all"}, 9),
        ({"keep": {"type": "all"}}, 9),
        ({"keep": {"type": "thinking_turns", "value": 2}}, 2),
        ({"keep": {"type": "thinking_turns", "value": 5}}, 5),
    ],
)
def test_thinking_of_earlier_messages_is_cleared(keep: dict[str, Any], kept: int) -> None:
    turns: list[dict[str, Any]] = []
    for number in range(3):
        thought = {"type": "thinking", "thinking": f"thought {number}", "signature": "s"}
        redacted = {"type": "redacted_thinking", "data": "x"}
        text = {"type": "text", "text": f"answer {number}"}
        turns += [*B["messages"], {"role": "assistant", "content": [thought, redacted, text]}]
    turns += B["messages"]
    edit = {"type": "clear_thinking_20251015", **keep}
    messages = parsed(messages=turns, context_management={"edits": [edit]})
    assert [text for role, text, _ in messages if role == "assistant"] == [
        f"answer {number}" for number in range(3)
    ]
    thoughts = [thought for role, _, thought in messages if role == "assistant"]
    expected = [f"thought {number}" for number in range(3)]
    assert thoughts == [None] * max(0, 3 - kept) + expected[-kept:]


@pytest.mark.parametrize("kind", sorted(CLIENT_TOOLS))
async def test_tools_of_the_client_have_their_schemas(service: Any, kind: str) -> None:
    function = CLIENT_TOOLS[kind]
    own = {
        "name": function.name,
        "description": function.description,
        "input_schema": function.parameters,
    }
    known = await request_of(service, tools=[{"type": kind, "name": function.name}])
    custom = await request_of(service, tools=[own])
    assert (known.prompt_ids, known.grammar) == (custom.prompt_ids, custom.grammar)


async def test_examples_are_in_the_prompt_and_not_in_the_grammar(service: Any) -> None:
    plain = await request_of(service, tools=[TOOL])
    given = await request_of(service, tools=[TOOL | {"input_examples": [{"city": "Paris"}]}])
    assert "Paris" in service.tokenizer.decode(given.prompt_ids)
    assert given.grammar == plain.grammar


HOSTED = ("web_search_20250305", "web_fetch_20260318", "code_execution_20250825",
          "tool_search_tool_regex", "tool_search_tool_bm25_20251119")  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_hosted_tools_are_left_out_with_a_warning(service: Any, stream: bool) -> None:
    hosted = [{"type": kind, "name": "a", "max_uses": 5} for kind in HOSTED]
    edits = [{"type": "clear_tool_uses_20250919", "trigger": {"type": "input_tokens", "value": 9}}]
    plain = await request_of(service, tools=[TOOL])
    reply = await sent(
        service, tools=[hosted[0], TOOL, *hosted[1:]], context_management={"edits": edits},
        stream=stream,
    )  # fmt: skip
    given = service.engine.seen[-1]
    assert (given.prompt_ids, given.grammar) == (plain.prompt_ids, plain.grammar)
    warning = reply.headers["x-quire-warning"]
    for index in (0, 2, 3, 4, 5):
        assert f"tools[{index}] is left out" in warning
    assert "tools[1]" not in warning
    assert "context_management.edits[0] has no effect" in warning
    alone = await sent(service, tools=hosted[:1], tool_choice={"type": "auto"})
    assert "tools[0]" in alone.headers["x-quire-warning"]
    assert "x-quire-warning" not in (await sent(service, tools=[TOOL])).headers
    named = {"tools": [hosted[0], TOOL], "tool_choice": {"type": "tool", "name": "a"}}
    assert (await service.post("/v1/messages", B | named)).status_code == 400


async def test_count_tokens_counts_the_prompt_of_the_same_fields(service: Any) -> None:
    fields: dict[str, Any] = {
        "model": "tiny-model",
        "system": [{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            *B["messages"],
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "c0", "name": "weather", "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c0", "content": "sunny"}]},
            {"role": "system", "content": "be brief"},
        ],
        "tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "mcp_servers": [],
    }  # fmt: skip
    reply = await service.post("/v1/messages/count_tokens", fields)
    assert reply.status_code == 200, reply.text
    request = await request_of(service, **fields)
    assert reply.json() == {"input_tokens": len(request.prompt_ids)}


async def test_the_older_name_of_the_format_is_accepted(service: Any) -> None:
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {}}}
    newer = await request_of(service, output_config={"format": form})
    older = await request_of(service, output_format=form)
    assert older.grammar == newer.grammar
    assert older.grammar is not None
    both = await service.post(
        "/v1/messages", B | {"output_format": form, "output_config": {"format": form}}
    )
    assert both.status_code == 400
    assert "output_config.format" in both.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_max_tokens_may_exceed_the_context(start_service: Any, stream: bool) -> None:
    """Agents ask for 32,000 tokens whatever the model. An answer that fills the context says so."""
    async with start_service(max_model_len=64) as service:
        reply = await sent(service, max_tokens=32_000, stream=stream)
        (request,) = service.engine.seen
        assert request.max_tokens == 64 - len(request.prompt_ids)
        assert '"stop_reason":"model_context_window_exceeded"' in reply.text
        reply = await sent(service, max_tokens=8, stream=stream)
        assert '"stop_reason":"max_tokens"' in reply.text
        long = {"messages": [{"role": "user", "content": "hello " * 500}]}
        refused = await service.post("/v1/messages", B | long)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith("messages must")


@pytest.mark.parametrize("seed", range(8))
async def test_a_call_cut_anywhere_is_not_complete(service: Any, seed: int) -> None:
    """Neither by its reason nor by its input, in a body and in a stream; the history of a client
    that continues may contain it.
    """
    call = TOOL_FORMATS["plain"].render([("weather", json.dumps({"city": "Paris", "days": [1]}))])
    ids = service.tokenizer.encode(call)
    cut = random.Random(seed).randrange(1, len(ids))
    service.engine.script = lambda _request: ids[:cut]
    service.engine.end = FinishReason.LENGTH
    body = (await sent(service, tools=[TOOL])).json()
    assert body["stop_reason"] == "max_tokens"
    complete = "}" in service.tokenizer.decode(ids[:cut])
    for block in body["content"]:
        if block["type"] == "text":
            assert "<tool_call>".startswith(block["text"])
        else:
            assert complete or block["input"] == {}
    streamed = (await sent(service, tools=[TOOL], stream=True)).text
    assert '"stop_reason":"max_tokens"' in streamed
    turns = [*B["messages"], {"role": "assistant", "content": body["content"]}, *B["messages"]]
    await sent(service, tools=[TOOL], messages=turns)


async def test_names_of_tools_may_be_as_long_as_at_anthropic(service: Any) -> None:
    """Clients of MCP servers send names such as `mcp__server__tool`."""
    name = "mcp__" + "x" * 123
    script = service.tokenizer.encode(TOOL_FORMATS["plain"].render([(name, "{}")]))
    service.engine.script = lambda _request: script
    service.engine.end = FinishReason.STOP
    body = (await sent(service, tools=[TOOL | {"name": name}])).json()
    assert [block["name"] for block in body["content"]] == [name]
