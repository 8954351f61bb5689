"""Anthropic's Python client."""

from __future__ import annotations

from typing import Any, Literal

import anthropic
import pytest
from pydantic import BaseModel

NAME = "anthropic"
TOOL: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    capital: bool


@pytest.fixture
def client(server: Any) -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def asked(server: Any, text: str, *, temperature: float = 0, **fields: Any) -> dict[str, Any]:
    """The client has no name for the temperature any more; the API has."""
    messages = [{"role": "user", "content": text}]
    options: dict[str, Any] = {"model": server.model, "max_tokens": 200, "messages": messages}
    return options | {"extra_body": {"temperature": temperature}} | fields


@pytest.mark.proves(NAME, "streams")
def test_a_stream_is_the_answer(client: Any, server: Any) -> None:
    options = asked(server, "Name three colours.", system="Be brief.", max_tokens=40)
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text
    assert text
    assert (final.stop_reason, final.usage.output_tokens) == (
        whole.stop_reason,
        whole.usage.output_tokens,
    )
    messages = [{"role": "user", "content": "hello"}]
    assert client.messages.count_tokens(model=server.model, messages=messages).input_tokens > 0


@pytest.mark.proves(NAME, "streams")
def test_an_answer_goes_on_with_what_was_begun(client: Any, server: Any) -> None:
    options = asked(server, "Count.", max_tokens=20, stop_sequences=["5"])
    options["messages"].append({"role": "assistant", "content": "1, 2, 3,"})
    message = client.messages.create(**options)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "5")
    assert message.content[0].text.strip().startswith("4")


@pytest.mark.proves(NAME, "tools")
def test_a_tool_is_called(client: Any, server: Any) -> None:
    options = asked(
        server,
        "What is the weather in Paris?",
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    whole = client.messages.create(**options)
    assert whole.stop_reason == "tool_use"
    call = whole.content[-1]
    assert (call.type, call.name, list(call.input)) == ("tool_use", "get_weather", ["city"])
    with client.messages.stream(**options) as stream:
        final = stream.get_final_message()
    assert final.content[-1].input == call.input

    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 21 degrees."}
    options["messages"] += [
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result]},
    ]
    options["tool_choice"] = {"type": "none"}
    answer = client.messages.create(**options)
    assert answer.content[0].type == "text"


@pytest.mark.proves(NAME, "structured")
def test_an_answer_is_parsed(client: Any, server: Any) -> None:
    options = asked(server, "Tell me of the city of Paris, as JSON.")
    message = client.messages.parse(**options, output_format=City)
    assert isinstance(message.parsed_output, City)


@pytest.mark.proves(NAME, "aborts")
def test_a_closed_stream_ends_the_answer(client: Any, server: Any, expect_cancel: Any) -> None:
    options = asked(server, "Tell me a very long story.", max_tokens=4000)
    with expect_cancel(), client.messages.stream(**options) as stream:
        next(iter(stream.text_stream))


@pytest.mark.proves(NAME, "errors")
def test_errors_are_its_exceptions(client: Any, server: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**asked(server, "hello", model="nope"))
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**asked(server, "hello", temperature=2))
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}
    messages = [{"role": "user", "content": [image]}]
    with pytest.raises(anthropic.BadRequestError, match="image is not"):
        client.messages.create(**asked(server, "hello", messages=messages))
