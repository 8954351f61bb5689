"""Tools in a chat: the stream sums up to the body, resumes anywhere; bad tools are rejected."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.api.generation.manifest import Manifest
from service.api.tools.formats import TOOL_FORMATS
from service.messages import FinishReason
from tests.support.builders import at_length, slowly

CHAT = "/v1/chat/completions"
PLAIN = TOOL_FORMATS["plain"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
RUN = {"type": "custom", "custom": {"name": "run", "description": "Runs Python."}}
BODY: dict[str, Any] = {
    "model": "tiny-model",
    "messages": [{"role": "user", "content": "hello"}],
    "tools": [WEATHER, NOW, RUN],
    "seed": 1,
}


REGEX = {"syntax": "regex", "definition": "[a-z]+"}


def grammar(**fields: str) -> dict[str, Any]:
    return {"type": "grammar", "grammar": REGEX | fields}


def custom(**fields: Any) -> dict[str, Any]:
    return {"tools": [NOW, {"type": "custom", "custom": {"name": "run", **fields}}]}


def allowed(*names: str, **fields: Any) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    content = {"mode": "required", "tools": tools, **fields}
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": content}}


@pytest.fixture
async def service(start_service: Any) -> AsyncIterator[Any]:
    """A replica whose context has room for tools."""
    async with start_service(max_model_len=4096) as started:
        yield started


def saying(service: Any, *answers: str) -> None:
    """Choice i of the engine's answers is answers[i]."""
    service.engine.end = FinishReason.STOP
    service.engine.script = lambda request: service.tokenizer.encode(
        answers[request.sampling.choice % len(answers)], add_bos=False
    )


def random_answer(draw: random.Random) -> str:
    values = [{}, {"city": "Zürich 😀"}, {"a": ["}{", '"', None]}]
    calls = [
        (draw.choice(["now", "get_weather"]), json.dumps(draw.choice(values), ensure_ascii=False))
        for _ in range(draw.randint(0, 3))
    ]
    if draw.random() < 0.5:
        calls.append(("run", json.dumps({"input": 'print("Zürich 😀\\n")\n'})))
    text = draw.choice(["", "One moment: <tool", "Let me see.\n\n"])
    answer = text + (PLAIN.render(calls) if calls else "")
    return answer[: draw.randint(1, len(answer) + 20)] or "é"


def summed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a body, accumulated from a stream's chunks as a client would."""
    choices: dict[int, dict[str, Any]] = defaultdict(lambda: {"content": None})
    for event in events:
        for chunk in event["choices"]:
            message = choices[chunk["index"]]
            delta = chunk["delta"]
            if delta.get("content") is not None:
                message["content"] = (message["content"] or "") + delta["content"]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                kind = "custom" if "custom" in call else "function"
                text = "input" if kind == "custom" else "arguments"
                if "id" in call:
                    assert call["index"] == len(calls)
                    calls.append({"id": call["id"], "type": call["type"], kind: {
                        "name": call[kind]["name"], text: ""}})  # fmt: skip
                calls[call["index"]][kind][text] += call[kind][text]
            if chunk["finish_reason"] is not None:
                assert "finish_reason" not in message, "a choice ends once"
                message["finish_reason"] = chunk["finish_reason"]
    return [choices[index] for index in sorted(choices)]


def plain(choice: dict[str, Any]) -> dict[str, Any]:
    message = dict(choice["message"])
    assert message.pop("role") == "assistant"
    assert (message.pop("refusal"), message.pop("annotations")) == (None, [])
    return message | {"finish_reason": choice["finish_reason"]}


@pytest.mark.parametrize("seed", [0, 1, *slowly(*range(2, 8)), *at_length(*range(8, 25))])
async def test_a_stream_of_calls_sums_up_to_its_body(
    service: Any, read_events: Any, seed: int
) -> None:
    draw = random.Random(seed)
    saying(service, *(random_answer(draw) for _ in range(3)))
    body = BODY | {"n": draw.randint(1, 3), "logprobs": draw.choice([None, True])}
    whole = (await service.post(CHAT, body, idempotency_key=f"k{seed}")).json()
    streamed = await service.post(CHAT, body | {"stream": True})
    first = await service.client.get(f"/v1/streams/{whole['id'].removeprefix('chatcmpl-')}")
    assert summed(read_events(first.content)) == [plain(c) for c in whole["choices"]]
    again = summed(read_events(streamed.content))  # another call: its calls have other ids
    for message, choice in zip(again, whole["choices"], strict=True):
        ids = [call.pop("id") for call in message.get("tool_calls", ())]
        assert len(set(ids)) == len(ids)
        expected = plain(choice)
        for call in expected.get("tool_calls", ()):
            assert call.pop("id") not in ids
        assert message == expected


@pytest.mark.parametrize("seed", [2, *slowly(0, 1, *range(3, 8)), *at_length(*range(8, 25))])
async def test_a_stream_of_calls_resumes_anywhere(service: Any, seed: int) -> None:
    draw = random.Random(100 + seed)
    saying(service, random_answer(draw))
    reply = await service.post(CHAT, BODY | {"stream": True}, x_quire_event_ids="1")
    call_id = reply.headers["x-request-id"]
    assert (await service.client.get(f"/v1/streams/{call_id}")).content == reply.content
    events = reply.content.split(b"\n\n")
    ids = [event.split(b"\n")[0][4:] for event in events if event.startswith(b"id: ")]
    assert len(set(ids)) == len(ids), "what a reader is sent once must not come again"
    for index, event in enumerate(events):
        if event.startswith(b"id: "):
            resumed = await service.client.get(
                f"/v1/streams/{call_id}",
                headers={"Last-Event-ID": event.split(b"\n")[0][4:].decode()},
            )
            assert resumed.content == b"\n\n".join(events[index + 1 :])


async def test_a_call_in_an_answer(service: Any) -> None:
    saying(service, "Let me see.\n" + PLAIN.render([("get_weather", '{"city": "Rome"}')]))
    reply = (await service.post(CHAT, BODY)).json()
    (choice,) = reply["choices"]
    message = choice["message"]
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert choice["finish_reason"] == "tool_calls"


async def test_a_prompt_with_tools_can_be_counted(service: Any) -> None:
    asked = {name: BODY[name] for name in ("model", "messages", "tools")}
    count = (await service.post("/tokenize", asked)).json()["count"]
    reply = (await service.post(CHAT, BODY | {"max_tokens": 2})).json()
    assert count == reply["usage"]["prompt_tokens"]
    assert count > (await service.post("/tokenize", asked | {"tools": None})).json()["count"]


async def test_held_back_text_arrives_with_the_end(service: Any, read_events: Any) -> None:
    """In one event: a reader that lost the end resumes before both, and gets neither twice."""
    saying(service, "a < b <tool_c")
    reply = await service.post(CHAT, BODY | {"stream": True}, x_quire_event_ids="1")
    events = read_events(reply.content)
    assert summed(events) == [{"content": "a < b <tool_c", "finish_reason": "stop"}]
    last = events[-1]["choices"][0]
    assert last["delta"]["content"].endswith("<tool_c")
    assert last["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("choice", "named", "calls", "several"),
    [
        ("auto", {"now", "get_weather"}, False, True),
        (None, {"now", "get_weather"}, False, True),
        ("required", {"now", "get_weather"}, True, True),
        ({"type": "function", "function": {"name": "now"}}, {"now"}, True, False),
    ],
)
@pytest.mark.parametrize("parallel", [True, False, None])
async def test_the_calls_that_the_grammar_allows(
    service: Any, choice: Any, named: set[str], calls: bool, several: bool, parallel: bool | None
) -> None:
    """A named function is called once, even if several calls are allowed."""
    asked = {"tool_choice": choice, "parallel_tool_calls": parallel}
    await service.post(CHAT, BODY | asked | {"n": 2, "max_tokens": 4})
    requests = service.engine.seen
    assert len(requests) == 2
    assert len({request.grammar for request in requests}) == 1
    grammar = requests[0].grammar
    assert {name for name in ("now", "get_weather") if f'"{name}\\"' in grammar} == named
    assert ("TEXT" not in grammar) == calls
    assert ("{0,31}" in grammar) == (several and parallel is not False)
    assert "get_weather" in service.tokenizer.decode(requests[0].prompt_ids)


@pytest.mark.parametrize(
    ("text", "end", "reason"),
    [
        (PLAIN.render([("now", "{}")]), FinishReason.LENGTH, "length"),
        (PLAIN.render([("now", '{"a": 1}')])[:-20], FinishReason.STOP, "stop"),
        ("no call", FinishReason.STOP, "stop"),
        (PLAIN.render([("now", "{}")]), FinishReason.STOP, "tool_calls"),
    ],
)
async def test_the_finish_reason_is_true(
    service: Any, text: str, end: FinishReason, reason: str
) -> None:
    saying(service, text)
    service.engine.end = end
    reply = (await service.post(CHAT, BODY)).json()
    assert reply["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        ({"type": "function", "function": {"name": "now"}}, {"now"}),
        ({"type": "custom", "custom": {"name": "run"}}, {"run"}),
        (allowed("now", "get_weather")["tool_choice"], {"now", "get_weather"}),
        ("required", {"now", "get_weather", "run"}),
    ],
)
async def test_a_choice_restricts_the_calls(
    service: Any, choice: dict[str, Any], calls: set[str]
) -> None:
    """A named tool is called once. All tools stay in the prompt."""
    reply = await service.post(CHAT, BODY | {"tool_choice": choice, "max_tokens": 4})
    assert reply.status_code == 200, reply.text
    (request,) = service.engine.seen
    prompt = service.tokenizer.decode(request.prompt_ids)
    assert all(name in prompt for name in ("now", "get_weather", "run"))
    called = {name for name in ("now", "get_weather", "run") if f'"{name}\\"' in request.grammar}
    assert called == calls
    assert ("{0,31}" in request.grammar) == (len(calls) > 1)


async def test_a_call_of_a_custom_tool_returns_to_the_prompt(service: Any) -> None:
    saying(service, PLAIN.render([("run", '{"input": "x = \\"1\\"\\n"}')]))
    message = (await service.post(CHAT, BODY)).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert (call["type"], call["custom"]) == ("custom", {"name": "run", "input": 'x = "1"\n'})
    result = {"role": "tool", "tool_call_id": call["id"], "content": "done"}
    messages = [*BODY["messages"], message, result]
    reply = await service.post(CHAT, BODY | {"messages": messages, "max_tokens": 4})
    assert reply.status_code == 200, reply.text
    prompt = service.tokenizer.decode(service.engine.seen[-1].prompt_ids)
    assert PLAIN.render([("run", '{"input": "x = \\"1\\"\\n"}')]) in prompt


@pytest.mark.parametrize(
    "arguments", ['{"city": "Zür', "", "[]", "{" * 500, '{"a":' * 70 + "1" + "}" * 70, "null", "x"]
)
async def test_a_call_that_was_cut_off_can_be_sent_back(service: Any, arguments: str) -> None:
    body = called(function={"name": "f", "arguments": arguments})
    result = {"role": "tool", "tool_call_id": "c", "content": "cut off"}
    body["messages"].append(result)
    reply = await service.post(CHAT, BODY | body | {"max_tokens": 4})
    assert reply.status_code == 200, reply.text
    assert arguments in service.tokenizer.decode(service.engine.seen[-1].prompt_ids)


@pytest.mark.parametrize("without", [{"tools": None}, {"tool_choice": "none"}, {"tools": []}])
async def test_without_tools_everything_is_text(service: Any, without: dict[str, Any]) -> None:
    text = PLAIN.render([("now", "{}")])
    saying(service, text)
    reply = (await service.post(CHAT, BODY | without)).json()
    assert reply["choices"][0]["message"]["content"] == text
    assert reply["choices"][0]["finish_reason"] == "stop"
    (request,) = service.engine.seen
    assert "get_weather" not in service.tokenizer.decode(request.prompt_ids)
    assert request.grammar is None


def test_a_manifest_with_tools_survives() -> None:
    manifest = Manifest.from_json(
        '{"endpoint":"chat","model":"m","fingerprint":"f","created":1,"prompts":[],'
        '"notation":"hermes"}'
    )
    assert manifest.notation == "hermes"
    assert Manifest.from_json(manifest.to_json()) == manifest


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [NOW, {"type": "function", "function": {"name": "f", **fields}}]}


def called(**fields: Any) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, **fields}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    return {"messages": messages}


def said(role: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x", **fields}]}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": "x"}, "tools", "invalid_type"),
    ({"tools": [NOW] * 129}, "tools", "array_above_max_length"),
    ({"tools": [{"type": "shell"}]}, "tools[0].type", "invalid_value"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom.name",
     "missing_required_parameter"),
    (custom(format={"type": "grammar"}), "tools[1].custom.format.grammar", "invalid_value"),
    (custom(format={"type": "text", "grammar": REGEX}), "tools[1].custom.format.grammar",
     "invalid_value"),
    (custom(format=grammar(syntax="ebnf")), "tools[1].custom.format.grammar.syntax",
     "invalid_value"),
    (custom(format=grammar(definition="a(")), "tools[1].custom.format", "invalid_grammar"),
    (custom(format=grammar(definition="a^b")), "tools[1].custom.format", "invalid_grammar"),
    (custom(format=grammar(syntax="lark", definition="start: other")), "tools[1].custom.format",
     "invalid_grammar"),
    (custom(format=grammar(syntax="lark", definition="start: <|im_end|>")),
     "tools[1].custom.format", "invalid_grammar"),
    (custom(name="now"), "tools[1].function.name", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"tools": [NOW | {"x": 1}]}, "tools[0].x", "unknown_parameter"),
    ({"tools": [WEATHER, NOW, NOW]}, "tools[2].function.name", "invalid_value"),
    (function(name="a b"), "tools[1].function.name", "invalid_value"),
    (function(name="x" * 129), "tools[1].function.name", "invalid_value"),
    (function(name=5), "tools[1].function.name", "invalid_type"),
    (function(parameters=[]), "tools[1].function.parameters", "invalid_type"),
    (function(parameters={"type": "string"}), "tools[1].function.parameters", "invalid_value"),
    (function(parameters={"type": "object", "title": "\ud800"}),
     "tools[1].function.parameters", "invalid_unicode"),
    (function(strict="yes"), "tools[1].function.strict", "invalid_type"),
    (function(description=5), "tools[1].function.description", "invalid_type"),
    ({"tool_choice": "any"}, "tool_choice", "invalid_value"),
    ({"tool_choice": 1}, "tool_choice", "invalid_type"),
    ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "function", "name": "now"}}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "now"}}}, "tool_choice",
     "invalid_value"),
    (allowed(), "tool_choice", "invalid_value"),
    (allowed("other"), "tool_choice", "invalid_value"),
    (allowed("now", mode="none"), "tool_choice", "invalid_value"),
    (allowed("now", more=1), "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice",
     "invalid_value"),
    ({"tools": None, "tool_choice": "auto"}, "tool_choice", "invalid_value"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", "invalid_type"),
    ({"structured_outputs": {"regex": "a"}}, "tools", "invalid_value"),
    ({"min_tokens": 3}, "min_tokens", "invalid_value"),
    ({"ignore_eos": True}, "ignore_eos", "invalid_value"),
    (function(parameters={"properties": {"a": {"type": "nothing"}}}),
     "tools[1].function.parameters", "invalid_grammar"),
    (function(parameters={"properties": {"a": {"not": {}}}}, strict=True),
     "tools[1].function.parameters.properties.a.not", "invalid_grammar"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"function_call": "auto"}, "function_call", "unsupported_parameter"),
    (called(id=5), "messages[1].tool_calls[0].id", "invalid_type"),
    (called(type="x"), "messages[1].tool_calls[0].type", "invalid_value"),
    (called(function={"name": "f"}), "messages[1].tool_calls[0].function.arguments",
     "missing_required_parameter"),
    (called(function={"name": "f", "arguments": {}}),
     "messages[1].tool_calls[0].function.arguments", "invalid_type"),
    (called(type="custom"), "messages[1].tool_calls[0].custom", "missing_required_parameter"),
    (said("tool"), "messages[0].tool_call_id", "missing_required_parameter"),
    (said("user", tool_call_id="c"), "messages[0].tool_call_id", "invalid_value"),
    (said("user", tool_calls=[]), "messages[0].tool_calls", "invalid_value"),
    (said("user", reasoning_content="x"), "messages[0].reasoning_content", "invalid_value"),
    (said("assistant", reasoning_content=5), "messages[0].reasoning_content", "invalid_type"),
    (said("user", content=[{"type": "text", "text": "x", "cache_control": 5}]),
     "messages[0].content", "invalid_type"),
    (said("system", content=None), "messages[0].content", "invalid_type"),
]  # fmt: skip


async def test_bad_tools_are_rejected(service: Any) -> None:
    for fields, param, code in BAD:
        reply = await service.post(CHAT, BODY | fields)
        error = reply.json().get("error")
        assert reply.status_code == 400, (fields, reply.json())
        assert (error["param"], error["code"]) == (param, code), fields
    assert service.engine.seen == []
