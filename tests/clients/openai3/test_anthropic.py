"""Anthropic's Python client."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from questions import ASK_NAME, CITY, COLOURS, HELLO, NAME, PARAMETERS, STORY, WEATHER, City, user

CLIENT = "anthropic"
TOOL: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": PARAMETERS,
}


@pytest.fixture
def client(server: Any) -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def asked(server: Any, text: str, *, temperature: float = 0, **fields: Any) -> dict[str, Any]:
    """The client has no name for the temperature any more; the API has."""
    options: dict[str, Any] = {"model": server.model, "max_tokens": 200, "messages": [user(text)]}
    return options | {"extra_body": {"temperature": temperature}} | fields


@pytest.mark.proves(CLIENT, "streams")
def test_a_stream_is_the_answer(client: Any, server: Any) -> None:
    options = asked(server, COLOURS, system="Be brief.", max_tokens=40)
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
    counted = client.messages.count_tokens(model=server.model, messages=[user(HELLO)])
    assert counted.input_tokens > 0


@pytest.mark.proves(CLIENT, "streams")
def test_an_answer_goes_on_with_what_was_begun(client: Any, server: Any) -> None:
    options = asked(server, "Count.", max_tokens=20, stop_sequences=["5"])
    options["messages"].append({"role": "assistant", "content": "1, 2, 3,"})
    message = client.messages.create(**options)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "5")
    assert message.content[0].text.strip().startswith("4")


@pytest.mark.proves(CLIENT, "tools", "turns")
def test_a_tool_is_called(client: Any, server: Any) -> None:
    options = asked(
        server,
        WEATHER,
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


@pytest.mark.proves(CLIENT, "structured")
def test_an_answer_is_parsed(client: Any, server: Any) -> None:
    options = asked(server, CITY)
    message = client.messages.parse(**options, output_format=City)
    assert isinstance(message.parsed_output, City)


@pytest.mark.proves(CLIENT, "turns")
def test_a_chat_goes_on(client: Any, server: Any) -> None:
    options = asked(server, NAME, max_tokens=20)
    first = client.messages.create(**options)
    options["messages"] += [{"role": "assistant", "content": first.content}, user(ASK_NAME)]
    second = client.messages.create(**options)
    assert second.content[0].text
    read = second.usage.input_tokens + (second.usage.cache_read_input_tokens or 0)
    assert read > first.usage.output_tokens


@pytest.mark.proves(CLIENT, "streams")
@pytest.mark.parametrize(
    "thinking",
    [
        {"type": "disabled"},
        {"type": "adaptive"},
        {"type": "enabled", "budget_tokens": 1024},
    ],
    ids=lambda thinking: thinking["type"],
)
def test_thinking_may_be_configured(client: Any, server: Any, thinking: Any) -> None:
    message = client.messages.create(**asked(server, HELLO, thinking=thinking, max_tokens=2000))
    assert message.content[-1].type == "text"


@pytest.mark.proves(CLIENT, "aborts")
def test_a_closed_stream_ends_the_answer(client: Any, server: Any, expect_cancel: Any) -> None:
    options = asked(server, STORY, max_tokens=4000)
    with expect_cancel(), client.messages.stream(**options) as stream:
        next(iter(stream.text_stream))


@pytest.mark.proves(CLIENT, "errors")
def test_errors_are_its_exceptions(client: Any, server: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**asked(server, HELLO, model="nope"))
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**asked(server, HELLO, temperature=2))
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}
    messages = [user([image])]
    with pytest.raises(anthropic.BadRequestError, match="image is not"):
        client.messages.create(**asked(server, HELLO, messages=messages))
