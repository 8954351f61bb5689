"""Function calls in responses: body, stream and resumed stream agree."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.api.tools.formats import TOOL_FORMATS
from service.messages import FinishReason
from tests.support.builders import at_length, slowly

URL = "/v1/responses"
PLAIN = TOOL_FORMATS["plain"]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}}, "strict": True},
    {"type": "function", "name": "now"},
]  # fmt: skip
B: dict[str, Any] = {"model": "tiny-model", "input": "hello", "tools": TOOLS, "seed": 3}


@pytest.fixture
async def service(start_service: Any) -> AsyncIterator[Any]:
    """A replica with room for tools in a prompt."""
    async with start_service(max_model_len=4096) as started:
        yield started


def script_text(service: Any, text: str) -> None:
    service.engine.end = FinishReason.STOP
    service.engine.script = lambda _: service.tokenizer.encode(text, add_bos=False)


def random_answer(draw: random.Random) -> str:
    values = ["{}", '{"city": "Zürich 😀"}', '{"a": ["}{", null]}']
    names = ["now", "get_weather"]
    calls = [(draw.choice(names), draw.choice(values)) for _ in range(draw.randint(0, 3))]
    text = draw.choice(["", "Let me see: <tool", "One moment.\n\n"])
    answer = text + (PLAIN.render(calls) if calls else "")
    return answer[: draw.randint(1, len(answer) + 20)] or "é"


def assemble(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that a client assembles from the events of a stream."""
    output: list[dict[str, Any]] = []
    for event in copy.deepcopy(events):
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output)
            output.append(event["item"])
        elif kind == "content_part.added":
            output[event["output_index"]]["content"].append(event["part"])
        elif kind == "output_text.delta":
            output[event["output_index"]]["content"][0]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            output[event["output_index"]]["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert output[event["output_index"]]["arguments"] == event["arguments"]
        elif kind == "output_item.done":
            before = output[event["output_index"]]
            assert before | {"status": event["item"]["status"]} == event["item"]
            output[event["output_index"]] = event["item"]
    return output


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, *slowly(*range(2, 8)), *at_length(*range(8, 30))])
async def test_body_stream_and_resumed_stream_agree(
    service: Any, read_events: Any, seed: int
) -> None:
    draw = random.Random(seed)
    script_text(service, random_answer(draw))
    if draw.random() < 0.3:
        service.engine.end = FinishReason.LENGTH
    reply = await service.post(URL, B | {"stream": True})
    events = read_events(reply.content)
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    final = events[-1]["response"]
    assert final["status"] == events[-1]["type"].removeprefix("response.")
    assert assemble(events) == final["output"]
    assert (await service.client.get(f"{URL}/{final['id']}")).json() == final
    for index, number in enumerate(numbers):
        resumed = await service.client.get(
            f"{URL}/{final['id']}?stream=true&starting_after={number}"
        )
        assert read_events(resumed.content) == events[index + 1 :], number


async def test_a_response_with_calls(service: Any, read_events: Any) -> None:
    script_text(service, "Let me see.\n" + PLAIN.render([("get_weather", '{"city": "Rome"}')]))
    body = (await service.post(URL, B)).json()
    message, call = body["output"]
    assert message["content"][0]["text"] == "Let me see."
    assert call["type"] == "function_call"
    assert call["status"] == "completed"
    assert call["call_id"].startswith("call_")
    assert (call["name"], call["arguments"]) == ("get_weather", '{"city": "Rome"}')
    assert body["tools"][0] == TOOLS[0]
    assert body["tool_choice"] == "auto"
    queued = (await service.post(URL, B | {"background": True})).json()
    assert queued["output"] == []
    while (state := (await service.client.get(f"{URL}/{queued['id']}")).json())["usage"] is None:
        await asyncio.sleep(0.005)
    assert state["output"][0]["content"] == message["content"]
    assert state["output"][1]["arguments"] == call["arguments"]
    streamed = await service.post(URL, B | {"stream": True}, x_quire_event_ids="1")
    kinds = [event["type"] for event in read_events(streamed.content)]
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    stream_id = streamed.headers["x-request-id"]
    again = await service.client.get(f"/v1/streams/{stream_id}")
    assert again.content == streamed.content
    whole = streamed.content.split(b"\n\n")
    for index, event in enumerate(whole):
        if event.startswith(b"id: "):
            rest = await service.client.get(
                f"/v1/streams/{stream_id}",
                headers={"Last-Event-ID": event.split(b"\n")[0][4:].decode()},
            )
            assert rest.content == b"\n\n".join(whole[index + 1 :])


async def test_items_become_messages_of_a_chat(service: Any) -> None:
    """The same conversation in both APIs gives the same prompt and the same grammar."""
    items = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Well."},
        {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}", "id": "fc_1",
         "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "9h"},
        {"type": "function_call_output", "call_id": "c2",
         "output": [{"type": "input_text", "text": "sunny"}]},
    ]  # fmt: skip
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for id_, name in (("c1", "now"), ("c2", "get_weather"))
    ]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Well.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "9h"},
        {"role": "tool", "tool_call_id": "c2", "content": "sunny"},
    ]
    functions = [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        for tool in TOOLS
    ]
    choices: list[tuple[Any, Any]] = [
        (None, None),
        ("required", "required"),
        ({"type": "function", "name": "now"}, {"type": "function", "function": {"name": "now"}}),
    ]
    for ours, theirs in choices:
        asked = {"input": items, "tool_choice": ours, "max_output_tokens": 4}
        await service.post(URL, B | asked | {"parallel_tool_calls": False})
        chat = {"model": "tiny-model", "messages": messages, "tools": functions, "max_tokens": 4}
        await service.post(
            "/v1/chat/completions",
            chat | {"tool_choice": theirs, "parallel_tool_calls": False, "seed": 3},
        )
        one, other = service.engine.seen[-2:]
        assert one.prompt_ids == other.prompt_ids
        assert one.grammar == other.grammar
        assert one.grammar is not None


async def test_custom_tools_are_those_of_chats(service: Any) -> None:
    """The same prompt and grammar, for the tools and for calls in the history."""
    grammar = {"syntax": "regex", "definition": "[a-z]+"}
    tools = [
        {"type": "custom", "name": "run", "description": "Runs.", "format": {"type": "text"}},
        {"type": "custom", "name": "word", "format": {"type": "grammar", **grammar}},
    ]
    items = [
        {"role": "user", "content": "go"},
        {"type": "custom_tool_call", "call_id": "c1", "name": "run", "input": 'ls "é"',
         "id": "ctc_1", "status": "completed"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "none"},
    ]  # fmt: skip
    reply = await service.post(URL, {"input": items, "tools": tools, "max_output_tokens": 4})
    assert reply.json()["tools"] == tools
    called = {"id": "c1", "type": "custom", "custom": {"name": "run", "input": 'ls "é"'}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "none", "tool_call_id": "c1"},
    ]
    theirs = [
        {"type": "custom", "custom": {"name": "run", "description": "Runs."}},
        {"type": "custom", "custom": {"name": "word", "format": {
            "type": "grammar", "grammar": grammar}}},
    ]  # fmt: skip
    chat = {"model": "tiny-model", "messages": messages, "tools": theirs, "max_tokens": 4}
    reply = await service.post("/v1/chat/completions", chat)
    assert reply.status_code == 200, reply.text
    one, other = service.engine.seen
    assert (one.prompt_ids, one.grammar) == (other.prompt_ids, other.grammar)
    listed = await service.client.get(
        f"{URL}/resp_{one.id.removesuffix('.0')}/input_items?order=asc"
    )
    assert [item["type"] for item in listed.json()["data"]] == [
        "message", "custom_tool_call", "custom_tool_call_output",
    ]  # fmt: skip


@pytest.mark.slow
async def test_the_client_assembles_tool_calls(service: Any, listen: Any) -> None:
    import openai

    script_text(
        service, "Well. " + PLAIN.render([("now", "{}"), ("get_weather", '{"city": "Rome"}')])
    )
    options: Any = {k: v for k, v in B.items() if k != "seed"}
    async with (
        listen(service.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = await client.responses.create(**options)
        async with client.responses.stream(**options) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
    items = [item.to_dict() for item in whole.output]
    assert [item["type"] for item in items] == ["message", "function_call", "function_call"]
    for one, other in zip(items, (item.to_dict() for item in final.output), strict=True):
        for name in ("name", "arguments", "status"):
            assert one.get(name) == other.get(name)
    assert json.loads(items[2]["arguments"]) == {"city": "Rome"}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "web_surf"}]}, "tools[0].type", "invalid_value"),
    ({"tools": [TOOLS[1], TOOLS[1]]}, "tools[1].name", "invalid_value"),
    ({"tools": [TOOLS[1] | {"parameters": {"type": "string"}}]}, "tools[0].parameters",
     "invalid_value"),
    ({"tools": [TOOLS[1] | {"parameters": {"properties": {"a": {"type": "x"}}}}]},
     "tools[0].parameters", "invalid_grammar"),
    ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice",
     "invalid_value"),
    ({"tools": None, "tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": {}}]}},
     "tool_choice", "invalid_value"),
    ({"include": ["message.output_text.logprobs"]}, "include", "invalid_value"),
    ({"tools": [{"type": "custom", "name": "x", "format": {"type": "grammar"}}]},
     "tools[0].format.definition", "invalid_value"),
    ({"input": [{"type": "function_call"}]}, "input[0].call_id", "missing_required_parameter"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output",
     "missing_required_parameter"),
    ({"input": [{"type": "item_reference", "id": 5}]}, "input[0].id", "invalid_type"),
]  # fmt: skip


async def test_invalid_tools(service: Any) -> None:
    for fields, param, code in BAD:
        reply = await service.post(URL, B | fields)
        error = reply.json().get("error") or {}
        assert (reply.status_code, error.get("param"), error.get("code")) == (400, param, code)
    assert service.engine.seen == []
    for harmless in ({"tools": [], "tool_choice": "auto"}, {"tools": None, "tool_choice": "none"}):
        reply = await service.post(URL, B | harmless | {"max_output_tokens": 2})
        assert reply.status_code == 200
