"""litellm, as a library: the provider for OpenAI-compatible servers."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

NAME = "litellm"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    capital: bool


def asked(server: Any, text: str, **fields: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": f"openai/{server.model}",
        "api_base": server.openai_url,
        "api_key": "none",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 200,
        "num_retries": 0,
        "max_retries": 0,
    }
    return options | fields


@pytest.mark.proves(NAME, "streams")
def test_a_stream_is_the_answer(server: Any) -> None:
    options = asked(server, "Name three colours.", max_tokens=40)
    whole: Any = litellm.completion(**options)
    chunks: list[Any] = list(litellm.completion(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert text
    rebuilt: Any = litellm.stream_chunk_builder(chunks)
    assert rebuilt.choices[0].message.content == text


@pytest.mark.proves(NAME, "tools")
def test_a_tool_is_called(server: Any) -> None:
    options = asked(server, "What is the weather in Paris?", tools=[TOOL], tool_choice="required")
    whole: Any = litellm.completion(**options)
    call = whole.choices[0].message.tool_calls[0].function
    assert (call.name, list(json.loads(call.arguments))) == ("get_weather", ["city"])
    rebuilt: Any = litellm.stream_chunk_builder(list(litellm.completion(**options, stream=True)))
    assert rebuilt.choices[0].message.tool_calls[0].function.arguments == call.arguments


@pytest.mark.proves(NAME, "structured")
def test_an_answer_follows_a_schema(server: Any) -> None:
    options = asked(server, "Tell me of the city of Paris, as JSON.", response_format=City)
    whole: Any = litellm.completion(**options)
    City.model_validate_json(whole.choices[0].message.content)


@pytest.mark.proves(NAME, "aborts")
def test_a_closed_stream_ends_the_answer(server: Any, expect_cancel: Any) -> None:
    options = asked(server, "Tell me a story.", max_tokens=4000, extra_body={"ignore_eos": True})

    async def give_up() -> None:
        stream: Any = await litellm.acompletion(**options, stream=True)
        await anext(stream)
        await stream.aclose()

    with expect_cancel():
        asyncio.run(give_up())


@pytest.mark.proves(NAME, "errors")
def test_errors_are_its_exceptions(server: Any) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked(server, "hello", model="openai/nope"))
    with pytest.raises(litellm.BadRequestError, match="less than or equal to 2"):
        litellm.completion(**asked(server, "hello", temperature=9))


@pytest.mark.proves(NAME, "streams")
def test_it_speaks_anthropics_shape_too(server: Any) -> None:
    options = asked(server, "Name a colour.", model=f"anthropic/{server.model}", max_tokens=20)
    options["api_base"] = server.url
    whole: Any = litellm.completion(**options)
    chunks: list[Any] = list(litellm.completion(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
