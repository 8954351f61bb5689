"""POST /v1/messages: Anthropic's shapes, and its own Python client against a real server."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from service.api.anthropic.answer import message_error_body
from service.api.anthropic.blocks import Turn
from service.api.anthropic.dialect import chat_messages
from service.api.tools.formats import TOOL_FORMATS
from service.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    GenerationFailed,
    QuireError,
    RateLimited,
    StreamDivergence,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from service.messages import FinishReason
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    import anthropic

B: dict[str, Any] = {
    "model": "tiny-model",
    "max_tokens": 12,
    "seed": 3,
    "messages": [{"role": "user", "content": "hello"}],
}


@pytest.fixture
async def service(start_service: Any) -> AsyncIterator[Any]:
    """A replica with room for tools in a prompt."""
    async with start_service(max_model_len=4096) as started:
        yield started


async def ask(service: Any, **fields: Any) -> dict[str, Any]:
    reply = await service.post("/v1/messages", B | fields)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def events_of(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(name, data) of each event, without the SSE ids."""
    events = []
    for block in body.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append((lines["event"], json.loads(lines["data"])))
    return events


def assemble(body: bytes) -> dict[str, Any]:
    """The message that a client assembles from the events. Checks their order."""
    (first, start), *rest = [event for event in events_of(body) if event[0] != "ping"]
    assert first == "message_start"
    message: dict[str, Any] = start["message"]
    open_block, arguments = None, ""
    for name, data in rest:
        assert data["type"] == name
        if name == "content_block_start":
            assert open_block is None
            open_block = data["index"]
            assert open_block == len(message["content"])
            message["content"].append(data["content_block"])
        elif name == "content_block_delta":
            assert data["index"] == open_block
            if data["delta"]["type"] == "text_delta":
                message["content"][open_block]["text"] += data["delta"]["text"]
            else:
                arguments += data["delta"]["partial_json"]
        elif name == "content_block_stop":
            assert data["index"] == open_block
            if arguments:
                message["content"][open_block]["input"] = json.loads(arguments)
            open_block, arguments = None, ""
        elif name == "message_delta":
            message |= data["delta"]
            message["usage"] |= data["usage"]
    assert open_block is None
    assert [name for name, _ in rest][-2:] == ["message_delta", "message_stop"]
    return message


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal apart from ids, which differ between calls."""
    blocks = [[part | {"id": ""} for part in message["content"]] for message in (one, other)]
    rest = [message | {"id": "", "content": None} for message in (one, other)]
    return blocks[0] == blocks[1] and rest[0] == rest[1]


async def test_the_shape_of_a_message(service: Any) -> None:
    reply = await service.post("/v1/messages", B)
    (request,) = service.engine.seen
    ids = service.engine.script(request)
    assert reply.json() == {
        "id": f"msg_{reply.headers['x-request-id']}",
        "type": "message",
        "role": "assistant",
        "model": "tiny-model",
        "content": [{"type": "text", "text": service.tokenizer.decode(ids), "citations": []}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": {
            "input_tokens": len(request.prompt_ids) - 2,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
            "output_tokens": 12,
            "output_tokens_details": {"thinking_tokens": 0},
            "server_tool_use": None,
            "service_tier": "standard",
            "inference_geo": None,
        },
    }
    assert reply.headers["request-id"] == reply.headers["x-request-id"]


async def test_fields_have_the_effect_of_the_fields_of_a_chat(service: Any) -> None:
    blocks = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    cached = {"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}
    await ask(
        service, system=[cached], messages=[{"role": "user", "content": blocks}], temperature=0.5,
        top_p=0.9, top_k=7, stop_sequences=["a", "b"], metadata={"user_id": "u1"}, priority=2,
    )  # fmt: skip
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    await service.post("/v1/chat/completions", {
        "model": "tiny-model", "messages": chat, "max_tokens": 12, "seed": 3, "temperature": 0.5,
        "top_p": 0.9, "top_k": 7, "stop": ["a", "b"], "priority": 2,
    })  # fmt: skip
    message, chatted = service.engine.seen
    assert message.prompt_ids == chatted.prompt_ids
    assert (message.sampling, message.stop) == (chatted.sampling, chatted.stop)
    assert (message.max_tokens, message.priority) == (chatted.max_tokens, chatted.priority)


async def test_an_answer_continues_a_final_assistant_message(service: Any) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "how are"}]
    await ask(service, messages=turns)
    (request,) = service.engine.seen
    assert service.tokenizer.decode(request.prompt_ids).endswith("how are")


@pytest.mark.parametrize(
    ("end", "stopped_by", "reason", "sequence"),
    [
        (FinishReason.STOP, None, "end_turn", None),
        (FinishReason.STOP, 2, "end_turn", None),
        (FinishReason.STOP, "xy", "stop_sequence", "xy"),
        (FinishReason.LENGTH, None, "max_tokens", None),
        (FinishReason.CANCELLED, None, "cancelled", None),
        (FinishReason.DEADLINE, None, "deadline", None),
    ],
)
async def test_stop_reasons(
    service: Any, end: FinishReason, stopped_by: Any, reason: str, sequence: str | None
) -> None:
    service.engine.end, service.engine.stopped_by = end, stopped_by
    body = await ask(service)
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)


async def test_an_empty_answer_has_no_blocks(service: Any) -> None:
    service.engine.script = lambda _request: []
    service.engine.end = FinishReason.STOP
    body = await ask(service)
    assert (body["content"], body["stop_reason"]) == ([], "end_turn")
    reply = await service.post("/v1/messages", B | {"stream": True})
    assert alike(assemble(reply.content), body)


TOOLS: Any = [
    {
        "name": name,
        "description": "what it does",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    for name in ("weather", "time")
]
CALLS = (("weather", '{"city": "Orl\u00e9ans 😀"}'), ("time", "{}"))


def script_text(service: Any, text: str) -> None:
    """Sets the text that the engine generates for every request."""
    ids = service.tokenizer.encode(text)
    service.engine.script = lambda _request: ids
    service.engine.end = FinishReason.STOP


async def test_a_tool_call_is_a_block(service: Any) -> None:
    script_text(service, "Let me see.\n" + TOOL_FORMATS["plain"].render(CALLS))
    body = await ask(service, tools=TOOLS)
    assert body["stop_reason"] == "tool_use"
    text, first, second = body["content"]
    assert text == {"type": "text", "text": "Let me see.", "citations": []}
    assert (first["type"], first["name"], first["input"]) == (
        "tool_use", "weather", {"city": "Orléans 😀"},
    )  # fmt: skip
    assert (second["name"], second["input"]) == ("time", {})
    assert first["id"] != second["id"]


async def test_a_call_that_was_cut_off_has_no_input(service: Any) -> None:
    script_text(service, TOOL_FORMATS["plain"].render(CALLS)[:60])
    service.engine.end = FinishReason.LENGTH
    body = await ask(service, tools=TOOLS)
    assert (body["stop_reason"], body["content"][0]["input"]) == ("max_tokens", {})


async def test_tools_give_the_prompt_and_grammar_of_a_chat(service: Any) -> None:
    """The same chat with tool results, in both APIs."""
    used = [
        {"type": "tool_use", "id": f"c{i}", "name": name, "input": json.loads(arguments)}
        for i, (name, arguments) in enumerate(CALLS)
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "c0", "content": "sunny"},
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "12"}]},
    ]
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "well"}, *used]},
        {"role": "user", "content": [*results, {"type": "text", "text": "and?"}]},
    ]
    asked = {"tools": TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    await ask(service, messages=turns, **asked)
    called = [
        {
            "id": use["id"],
            "type": "function",
            "function": {
                "name": use["name"],
                "arguments": json.dumps(use["input"], ensure_ascii=False),
            },
        }
        for use in used
    ]
    chat = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "well", "tool_calls": called},
        {"role": "tool", "tool_call_id": "c0", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c1", "content": "12"},
        {"role": "user", "content": "and?"},
    ]
    functions = [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                "description": tool["description"],
                "parameters": tool["input_schema"],
            },
        }
        for tool in TOOLS
    ]
    reply = await service.post("/v1/chat/completions", {
        "model": "tiny-model", "messages": chat, "tools": functions, "seed": 3, "max_tokens": 12,
        "parallel_tool_calls": False,
    })  # fmt: skip
    assert reply.status_code == 200, reply.text
    message, chatted = service.engine.seen
    assert message.prompt_ids == chatted.prompt_ids
    assert message.grammar == chatted.grammar


async def test_an_output_format_gives_the_grammar_of_a_chat(service: Any) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    await ask(service, output_config={"format": {"type": "json_schema", "schema": schema}})
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    await service.post("/v1/chat/completions", {
        "model": "tiny-model", "messages": B["messages"], "max_tokens": 12, "response_format": form,
    })  # fmt: skip
    message, chatted = service.engine.seen
    assert message.grammar is not None
    assert message.grammar == chatted.grammar


def test_texts_between_tool_results_become_separate_messages() -> None:
    """Checked on the messages: the prompt of templates without tools does not show call ids."""
    result = {"type": "tool_result", "content": "sunny"}
    content = [
        {"type": "text", "text": "so"},
        result | {"tool_use_id": "c0"},
        result | {"tool_use_id": "c1", "content": [], "is_error": True},
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
    ]
    messages = chat_messages(Turn.model_validate({"role": "user", "content": content}))
    assert [(m.role, m.content, m.tool_call_id) for m in messages] == [
        ("user", "so", None),
        ("tool", "sunny", "c0"),
        ("tool", "", "c1"),
        ("user", "ab", None),
    ]
    use = {"type": "tool_use", "id": "c0", "name": "weather", "input": {"city": "é"}}
    turn = Turn.model_validate({"role": "assistant", "content": [use, content[0]]})
    (message,) = chat_messages(turn)
    assert (message.role, message.content) == ("assistant", "so")
    (call,) = message.tool_calls
    assert (call.id, call.name) == ("c0", "weather")
    assert call.arguments == '{"city": "é"}'


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "time"}, {"type": "none"}]
)
async def test_tool_choices_have_the_effect_of_those_of_a_chat(
    service: Any, choice: dict[str, str]
) -> None:
    named = {"type": "function", "function": {"name": "time"}}
    theirs = {"any": "required", "tool": named, "none": "none"}[choice["type"]]
    await ask(service, tools=TOOLS[1:], tool_choice=choice)
    function = {"name": "time", "description": "what it does"}
    function["parameters"] = TOOLS[1]["input_schema"]
    await service.post("/v1/chat/completions", {
        "model": "tiny-model", "messages": B["messages"], "seed": 3, "max_tokens": 12,
        "tools": [{"type": "function", "function": function}], "tool_choice": theirs,
    })  # fmt: skip
    message, chatted = service.engine.seen
    assert message.prompt_ids == chatted.prompt_ids
    assert message.grammar == chatted.grammar


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_a_stream_assembles_to_the_body_and_resumes_after_any_event(
    service: Any, seed: int
) -> None:
    draw = random.Random(seed)
    asked = B | {"seed": draw.randrange(2**64), "max_tokens": draw.randint(1, 20)}
    if seed % 2:
        asked["tools"] = TOOLS
        before = draw.choice(["", "Let me see. < ", "<tool_call"])
        script_text(service, before + TOOL_FORMATS["plain"].render(CALLS[: draw.randint(1, 2)]))
    whole = (await service.post("/v1/messages", asked)).json()
    plain = await service.post("/v1/messages", asked | {"stream": True})
    reply = await service.post("/v1/messages", asked | {"stream": True}, x_quire_event_ids="1")
    for streamed in (plain, reply):
        assert alike(assemble(streamed.content), whole)
    assert b"\nid: " not in plain.content
    path = f"/v1/streams/{reply.headers['x-request-id']}"
    assert (await service.client.get(path)).content == reply.content
    events = reply.content.split(b"\n\n")
    positions = [index for index, event in enumerate(events) if event.startswith(b"id: ")]
    counts = {events[index].split(b".")[0] for index in positions}
    assert len(counts) == len(positions), "each token record has one id"
    for index in positions:
        event_id = events[index].split(b"\n")[0][4:].decode()
        resumed = await service.client.get(path, headers={"Last-Event-ID": event_id})
        assert resumed.content == b"\n\n".join(events[index + 1 :])


async def test_count_tokens(service: Any) -> None:
    body: dict[str, Any] = {name: B[name] for name in ("model", "messages")}
    for fields in ({}, {"system": "be kind"}):
        reply = await service.post("/v1/messages/count_tokens", body | fields)
        usage = (await ask(service, **fields))["usage"]
        count = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert reply.json() == {"input_tokens": count}


ONLY = (
    "messages[0].content only blocks of the type text, thinking, redacted_thinking, tool_use, "
    "tool_result are supported"
)


@pytest.mark.parametrize(
    ("fields", "status", "kind", "message"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens: "),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature: "),
        ({"model": "nope"}, 404, "not_found_error", "model: "),
        ({"messages": []}, 400, "invalid_request_error", "messages must have 1 or more"),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences must"),
        ({"stop_sequences": ["a"] * 17}, 400, "invalid_request_error", "stop_sequences may"),
        ({"stop": ["a"]}, 400, "invalid_request_error", "stop: "),
        ({"thinking": {"type": "enabled"}}, 400, "invalid_request_error", "thinking.enabled"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 9}}, 400, "invalid_request_error",
         "thinking.adaptive.budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, 400, "invalid_request_error", "thinking"),
        ({"output_config": {"effort": "none"}}, 400, "invalid_request_error",
         "output_config.effort: "),
        ({"context_management": {"edits": [{"type": "nope"}]}}, 400, "invalid_request_error",
         "context_management.edits[0]"),
        ({"container": "c"}, 400, "invalid_request_error", "container is not supported"),
        ({"output_config": {"format": {"type": "json_schema"}}}, 400, "invalid_request_error",
         "output_config.format.schema: "),
        ({"mcp_servers": [{}]}, 400, "invalid_request_error", "mcp_servers is not"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400, "invalid_request_error", f"{ONLY} (image is not: ",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}]}]},
            400, "invalid_request_error", "messages[0].content[0].tool_result.content only blocks",
        ),
        (
            {"messages": [{"role": "system", "content": [
                {"type": "tool_result", "tool_use_id": "a"}]}]},
            400, "invalid_request_error", "messages[0].content may contain",
        ),
        ({"messages": [{"role": "user", "content": "a", "clear_at": "never"}]}, 400,
         "invalid_request_error", "messages[0].clear_at needs the role system"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            400, "invalid_request_error", "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
            400, "invalid_request_error", "messages[0].content may contain tool_use",
        ),
        (
            {"messages": [{"role": "assistant", "content": [
                {"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
            400, "invalid_request_error", "messages: the last message",
        ),
        ({"tools": [{"type": "bash_20990101", "name": "bash"}]}, 400, "invalid_request_error",
         "tools[0]: only tools of the client"),
        ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "a"}]}, 400,
         "invalid_request_error", "tools[0]: only tools of the client"),
        ({"tools": [{"name": "a", "input_schema": {}, "nope": 1}]}, 400, "invalid_request_error",
         "tools[0].nope"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice needs"),
    ],
)  # fmt: skip
async def test_errors_have_the_form_of_anthropic(
    service: Any, fields: Any, status: int, kind: str, message: str
) -> None:
    reply = await service.post("/v1/messages", B | fields)
    assert reply.status_code == status
    body = reply.json()
    assert set(body) == {"type", "error"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["error"]["message"].startswith(message), body
    assert reply.headers["request-id"]


async def test_only_paths_of_messages_have_this_form_of_errors(service: Any) -> None:
    ours = await service.post("/v1/chat/completions", {"model": "nope"})
    assert "param" in ours.json()["error"]
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/batches"):
        theirs = await service.client.get(path)
        assert theirs.status_code in {404, 405}
        assert theirs.json()["type"] == "error"
    broken = await service.client.post(
        "/v1/messages", content=b"{", headers={"content-type": "application/json"}
    )
    assert (broken.status_code, broken.json()["type"]) == (400, "error")


async def test_a_missing_key_is_an_error_in_this_form(start_service: Any) -> None:
    def reject(_scope: Any) -> Any:
        raise Unauthorized("there is no valid key")

    async with start_service(authenticate=reject) as service:
        reply = await service.post("/v1/messages", B)
    assert (reply.status_code, reply.json()["error"]["type"]) == (401, "authentication_error")
    assert reply.headers["request-id"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Forbidden("x"), "permission_error"),
        (TooLarge("x"), "request_too_large"),
        (Conflict("x"), "invalid_request_error"),
        (RateLimited("x"), "rate_limit_error"),
        (Unavailable("x"), "overloaded_error"),
        (DeadlineExceeded("x"), "timeout_error"),
        (GenerationFailed("x"), "api_error"),
        (StreamDivergence("x"), "api_error"),
    ],
)
def test_types_of_errors(error: QuireError, kind: str) -> None:
    assert json.loads(message_error_body(error)) == {
        "type": "error",
        "error": {"type": kind, "message": "x"},
    }


@pytest.fixture
async def client(service: Any, listen: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    import anthropic

    async with (
        listen(service.app) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client


OPTIONS: Any = {name: B[name] for name in ("model", "messages", "max_tokens")} | {
    "extra_body": {"seed": 5}
}


@pytest.mark.slow
async def test_the_client_creates_and_streams(
    service: Any, client: anthropic.AsyncAnthropic
) -> None:
    whole = await client.messages.create(**OPTIONS)
    (block,) = whole.content
    assert block.type == "text"
    assert block.text == service.tokenizer.decode(service.engine.script(service.engine.seen[0]))
    assert whole._request_id == whole.id.removeprefix("msg_")

    raw = await client.messages.create(**OPTIONS, stream=True)
    deltas = [event async for event in raw if event.type == "content_block_delta"]
    assert "".join(getattr(event.delta, "text", "") for event in deltas) == block.text

    async with client.messages.stream(**OPTIONS) as stream:
        text = [piece async for piece in stream.text_stream]
        final = await stream.get_final_message()
    assert "".join(text) == block.text
    same = {"stop_reason", "stop_sequence", "usage", "role", "model", "type"}
    assert final.model_dump(include=same) == whole.model_dump(include=same)
    assert [part.to_dict() for part in final.content] == [block.to_dict()]

    count = await client.messages.count_tokens(model="tiny-model", messages=OPTIONS["messages"])
    assert count.input_tokens == whole.usage.input_tokens + 2


@pytest.mark.slow
async def test_the_client_assembles_tool_calls(
    service: Any, client: anthropic.AsyncAnthropic
) -> None:
    script_text(service, "Well." + TOOL_FORMATS["plain"].render(CALLS))
    whole = await client.messages.create(**OPTIONS, tools=TOOLS)
    async with client.messages.stream(**OPTIONS, tools=TOOLS) as stream:
        final = await stream.get_final_message()
    assert (final.stop_reason, len(final.content)) == ("tool_use", 3)
    assembled, body = (m.to_dict(exclude_none=True) for m in (final, whole))
    assert alike(assembled, body)


@pytest.mark.slow
async def test_errors_become_exceptions_of_the_client(
    service: Any, client: anthropic.AsyncAnthropic
) -> None:
    import anthropic

    with pytest.raises(anthropic.BadRequestError) as bad:
        await client.messages.create(**OPTIONS | {"max_tokens": 0})
    assert bad.value.body == {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "max_tokens: input should be greater than or equal to 1",
        },
    }
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.messages.create(**OPTIONS | {"model": "nope"})
    assert missing.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="container is not supported"):
        await client.beta.messages.create(**OPTIONS, container="c")
    service.state["draining"] = True
    with pytest.raises(anthropic.InternalServerError) as away:
        await client.messages.create(**OPTIONS)
    assert (away.value.status_code, away.value.type) == (503, "overloaded_error")
    service.state["draining"] = False
    service.engine.bad_digest_at = 2
    with pytest.raises(anthropic.APIStatusError, match="api_error"):
        async with client.messages.stream(**OPTIONS) as stream:
            await stream.until_done()


@pytest.mark.slow
async def test_closing_a_stream_cancels_it(service: Any, client: anthropic.AsyncAnthropic) -> None:
    service.engine.pause = 0.01
    async with client.messages.stream(**OPTIONS | {"max_tokens": 200}) as stream:
        async for _ in stream.text_stream:
            break
    async with asyncio.timeout(PATIENCE):
        while not service.engine.fenced:
            await asyncio.sleep(0.005)


@pytest.mark.slow
async def test_the_synchronous_client(service: Any, listen: Any) -> None:
    import anthropic

    def talk(url: str) -> tuple[str, str]:
        with anthropic.Anthropic(base_url=url, api_key="none") as client:
            whole: Any = client.messages.create(**OPTIONS)
            with client.messages.stream(**OPTIONS) as stream:
                return whole.content[0].text, stream.get_final_text()

    async with listen(service.app) as url:
        whole, streamed = await asyncio.to_thread(talk, url)
    assert whole == streamed


@pytest.mark.slow
async def test_the_client_ignores_pings_that_keep_alive(
    start_service: Any, small_limits: Any, listen: Any
) -> None:
    import anthropic

    async with (
        start_service(limits=small_limits(keep_alive=0.02)) as service,
        listen(service.app) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        service.engine.pause = 0.05
        async with client.messages.stream(**OPTIONS | {"max_tokens": 4}) as stream:
            final = await stream.get_final_message()
        assert final.usage.output_tokens == 4
        asked = B | {"max_tokens": 4}
        raw = await service.post("/v1/messages", asked | {"stream": True})
        names = [name for name, _ in events_of(raw.content)]
        assert names[0] == "message_start"
        assert names.count("ping") > 1
        assert alike(assemble(raw.content), (await service.post("/v1/messages", asked)).json())


@pytest.mark.slow
def test_a_message_and_a_chat_get_the_same_answer(server_url: str) -> None:
    import anthropic
    import openai

    turns: Any = [{"role": "user", "content": "Name three colours."}]
    with anthropic.Anthropic(base_url=server_url, api_key="none") as client:
        message: Any = client.messages.create(
            model="smollm2-135m-instruct", messages=turns, max_tokens=30, system="Be brief.",
            extra_body={"temperature": 0},
        )  # fmt: skip
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none") as client_of_openai:
        chat: Any = client_of_openai.chat.completions.create(
            model="smollm2-135m-instruct", max_tokens=30, temperature=0,
            messages=[{"role": "system", "content": "Be brief."}, *turns],
        )  # fmt: skip
    assert message.content[0].text == chat.choices[0].message.content
    assert message.usage.output_tokens == chat.usage.completion_tokens
