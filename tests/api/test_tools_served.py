"""Tools as OpenAI's own client sees them, served by a real process with the default model.

The model is small and samples at high temperatures: the grammar makes every call well-formed and
match its schema.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema_rs
import openai
import pytest

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
PARAMETERS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20, "description": "The name of the city."},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "book": {
        "type": "object",
        "properties": {
            "seats": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"type": "integer",
                      "minimum": 1, "maximum": 40}},
            "name": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 8}]},
        },
        "required": ["seats", "name"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}  # fmt: skip
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in PARAMETERS.items()
]
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture
async def client(server_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="x", max_retries=0) as made:
        yield made


def calls_of(message: Any) -> list[tuple[str, str]]:
    """(name, arguments) of each call."""
    return [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]


def check(message: Any) -> list[tuple[str, str]]:
    """The same; all of them match their schemas."""
    called = calls_of(message)
    for name, arguments in called:
        jsonschema_rs.validate(PARAMETERS[name], json.loads(arguments))
    assert len({call.id for call in message.tool_calls or ()}) == len(called)
    return called


async def test_forced_calls_fit_whatever_is_sampled(client: openai.AsyncOpenAI) -> None:
    async def ask(seed: int) -> list[tuple[str, str]]:
        completion = await client.chat.completions.create(
            model=MODEL, messages=ASK, tools=TOOLS, tool_choice="required", seed=seed,
            temperature=1 + seed % 2, parallel_tool_calls=seed % 3 == 0, max_tokens=200,
        )  # fmt: skip
        (choice,) = completion.choices
        if choice.finish_reason == "length":
            return []
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        called = check(choice.message)
        assert len(called) == 1 or (called and seed % 3 == 0)
        return called

    answers = await asyncio.gather(*(ask(seed) for seed in range(18)))
    assert sum(bool(called) for called in answers) > 14
    assert {name for called in answers for name, _ in called} == set(PARAMETERS)


@pytest.mark.parametrize("choice", ["required", "auto", "named"])
async def test_the_stream_is_the_whole_answer(client: openai.AsyncOpenAI, choice: str) -> None:
    named = {"type": "function", "function": {"name": "book"}}
    options: Any = {
        "model": MODEL, "messages": ASK, "tools": TOOLS, "seed": 4, "n": 2, "max_tokens": 120,
        "tool_choice": named if choice == "named" else choice,
    }  # fmt: skip
    whole = await client.chat.completions.create(**options)
    said: list[str | None] = [None, None]
    called: list[list[list[str]]] = [[], []]
    reasons: list[str | None] = [None, None]
    async for chunk in await client.chat.completions.create(**options, stream=True):
        for part in chunk.choices:
            if part.delta.content is not None:
                said[part.index] = (said[part.index] or "") + part.delta.content
            for call in part.delta.tool_calls or ():
                if call.id is not None:
                    called[part.index].append([call.function.name, ""])
                called[part.index][call.index][1] += call.function.arguments
            reasons[part.index] = part.finish_reason or reasons[part.index]
    for one in whole.choices:
        assert calls_of(one.message) == [tuple(call) for call in called[one.index]]
        assert one.message.content == said[one.index]
        assert one.finish_reason == reasons[one.index]
        if one.finish_reason == "tool_calls":
            assert check(one.message)
        if choice == "named":
            assert {name for name, _ in calls_of(one.message)} == {"book"}


async def test_a_round_with_results(client: openai.AsyncOpenAI) -> None:
    first = await client.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS[:1], tool_choice="required", temperature=0,
        parallel_tool_calls=False,
    )  # fmt: skip
    message = first.choices[0].message
    ((name, arguments),) = check(message)
    assert name == "get_weather"
    assert json.loads(arguments)["city"] == "Paris"
    call = (message.tool_calls or [])[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees celsius."}
    messages: Any = [*ASK, message.model_dump(), result]  # with all that it holds, empty or not
    second = await client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS[:1], temperature=0, max_tokens=60
    )
    said = second.choices[0].message
    assert check(said) or "sunny" in (said.content or "").lower()


async def test_a_model_that_has_called_calls_again(client: openai.AsyncOpenAI) -> None:
    """It continues as it began: here with text that becomes a call."""
    messages = list(ASK)
    for number, city in enumerate(("Rome", "Oslo", "Lima")):
        arguments = json.dumps({"city": city, "unit": "celsius"})
        call = {"id": f"c{number}", "type": "function",
                "function": {"name": "get_weather", "arguments": arguments}}  # fmt: skip
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{number}", "content": f"{20 + number} degrees"},
            {"role": "user", "content": "What is the weather in Paris?"},
        ]
    completion = await client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, temperature=0, max_tokens=100
    )
    (choice,) = completion.choices
    assert check(choice.message), choice
    assert choice.finish_reason == "tool_calls"


async def test_a_bad_schema_is_rejected_by_its_path(client: openai.AsyncOpenAI) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    tool: Any = {"type": "function", "function": {"name": "bad", "parameters": bad}}
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.chat.completions.create(model=MODEL, messages=ASK, tools=[*TOOLS, tool])
    assert refusal.value.param == "tools[3].function.parameters"
    assert refusal.value.code == "invalid_grammar"


async def test_a_format_and_tools(client: openai.AsyncOpenAI) -> None:
    """Text has the format, and calls match; forced calls leave no text that could have it."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    asked: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    completion = await client.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS, response_format=asked, seed=1, n=4, max_tokens=150
    )
    whole = [choice for choice in completion.choices if choice.finish_reason != "length"]
    assert whole  # others were cut, perhaps within a call
    for choice in whole:
        if not check(choice.message):
            jsonschema_rs.validate(schema, json.loads(choice.message.content or ""))
    forced: Any = {"model": MODEL, "messages": ASK, "tools": TOOLS, "seed": 2, "max_tokens": 150}
    forced |= {"tool_choice": "required"}
    alone = await client.chat.completions.create(**forced)
    beside = await client.chat.completions.create(**forced, response_format=asked)
    assert beside.choices[0].message.tool_calls
    assert [call.function for call in beside.choices[0].message.tool_calls] == [
        call.function for call in alone.choices[0].message.tool_calls or ()
    ]
