"""Haystack's chat generators."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from haystack.components.generators.chat import (
    OpenAIChatGenerator,
    OpenAIResponsesChatGenerator,
)
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret
from questions import ASK_NAME, CITY, COLOURS, NAME, WEATHER, City, get_weather

CLIENT = "haystack"
TOOL = create_tool_from_function(get_weather)


@pytest.fixture(params=["chat", "responses"])
def ask(request: pytest.FixtureRequest, server: Any) -> Any:
    """A function from messages and options to the reply."""
    chat = request.param == "chat"
    kind = OpenAIChatGenerator if chat else OpenAIResponsesChatGenerator

    def run(
        *messages: ChatMessage,
        max_tokens: int = 40,
        tools: Any = None,
        on: Any = None,
        **fields: Any,
    ) -> ChatMessage:
        limit = "max_tokens" if chat else "max_output_tokens"
        options = {"temperature": 0, limit: max_tokens, **fields}
        generator = kind(
            api_key=Secret.from_token("none"),
            model=server.model,
            api_base_url=server.openai_url,
            max_retries=0,
            generation_kwargs=options,
            tools=tools,
            streaming_callback=on,
        )
        (reply,) = generator.run(list(messages))["replies"]
        return reply

    return run


@pytest.mark.proves(CLIENT, "streams")
def test_a_stream_is_the_answer(ask: Any) -> None:
    question = ChatMessage.from_user(COLOURS)
    whole = ask(question)
    chunks: list[Any] = []
    assert ask(question, on=chunks.append).text == whole.text
    assert "".join(chunk.content for chunk in chunks) == whole.text
    assert whole.text


@pytest.mark.proves(CLIENT, "tools", "turns")
def test_a_tool_is_called(ask: Any) -> None:
    question = ChatMessage.from_user(WEATHER)
    forced: Any = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(question, **forced, max_tokens=200)
    (call,) = whole.tool_calls
    assert (call.tool_name, list(call.arguments)) == ("get_weather", ["city"])
    streamed = ask(question, **forced, max_tokens=200, on=lambda _chunk: None)
    assert streamed.tool_calls[0].arguments == call.arguments
    result = ChatMessage.from_tool(TOOL.invoke(**call.arguments), call)
    assert ask(question, whole, result).text


@pytest.mark.proves(CLIENT, "structured")
def test_an_answer_follows_a_schema(ask: Any, request: pytest.FixtureRequest) -> None:
    chat = request.node.callspec.params["ask"] == "chat"
    form = {"response_format" if chat else "text_format": City}
    City.model_validate_json(ask(ChatMessage.from_user(CITY), max_tokens=200, **form).text)


@pytest.mark.proves(CLIENT, "turns")
def test_a_chat_goes_on(ask: Any) -> None:
    question = ChatMessage.from_user(NAME)
    assert ask(question, ask(question), ChatMessage.from_user(ASK_NAME)).text


@pytest.mark.proves(CLIENT, "errors")
def test_errors_are_its_exceptions(ask: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(ChatMessage.from_user(COLOURS), temperature=9)
