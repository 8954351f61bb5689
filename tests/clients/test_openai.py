"""OpenAI's Python client."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

NAME = "openai (Python)"
MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]
LONG: Any = {
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 4000,
    "extra_body": {"ignore_eos": True},
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    capital: bool


@pytest.fixture
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0)


@pytest.mark.proves(NAME, "streams")
def test_a_stream_is_the_answer(client: Any, server: Any) -> None:
    asked: Any = {"model": server.model, "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    completion = client.completions.create(model=server.model, prompt="One, two,", max_tokens=5)
    assert completion.choices[0].finish_reason == "length"


@pytest.mark.proves(NAME, "streams")
def test_a_response_streams(client: Any, server: Any) -> None:
    asked: Any = {"model": server.model, "input": "Name a colour.", "temperature": 0}
    whole = client.responses.create(**asked, max_output_tokens=20)
    with client.responses.stream(**asked, max_output_tokens=20) as stream:
        deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text


@pytest.mark.proves(NAME, "tools")
def test_a_tool_is_called(client: Any, server: Any) -> None:
    asked: Any = {
        "model": server.model,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert list(json.loads(call.function.arguments)) == ["city"]

    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls[0]
    assert streamed.function.arguments == call.function.arguments

    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."}
    told = [*asked["messages"], choice.message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(
        model=server.model, messages=told, tools=[WEATHER], tool_choice="none", max_tokens=40
    )
    assert answer.choices[0].message.content


@pytest.mark.proves(NAME, "structured")
def test_an_answer_is_parsed(client: Any, server: Any) -> None:
    parsed = client.chat.completions.parse(
        model=server.model,
        messages=[{"role": "user", "content": "Tell me of the city of Paris, as JSON."}],
        response_format=City,
        temperature=0,
        max_tokens=200,
    )
    assert isinstance(parsed.choices[0].message.parsed, City)


@pytest.mark.proves(NAME, "aborts")
def test_a_closed_stream_ends_the_answer(client: Any, server: Any, expect_cancel: Any) -> None:
    with (
        expect_cancel(),
        client.chat.completions.create(**LONG, model=server.model, stream=True) as stream,
    ):
        next(iter(stream))


@pytest.mark.proves(NAME, "errors")
def test_errors_are_its_exceptions(client: Any, server: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=server.model, messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.001).chat.completions.create(
            model=server.model, messages=MESSAGES
        )
