"""llama-index: its OpenAI-like model."""

from __future__ import annotations

import gc
from typing import Any, Literal

import openai
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

NAME = "llama-index"


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    capital: bool


def chat_model(server: Any, **fields: Any) -> OpenAILike:
    options: dict[str, Any] = {
        "model": server.model,
        "api_base": server.openai_url,
        "api_key": "none",
        "is_chat_model": True,
        "is_function_calling_model": True,
        "should_use_structured_outputs": True,
        "context_window": 8192,
        "temperature": 0,
        "max_tokens": 200,
        "max_retries": 0,
    }
    return OpenAILike(**options | fields)


QUESTION = [ChatMessage(role="user", content="Name three colours.")]


@pytest.mark.proves(NAME, "streams")
def test_a_stream_is_the_answer(server: Any) -> None:
    model = chat_model(server, max_tokens=40)
    whole = model.chat(QUESTION).message.content
    chunks = list(model.stream_chat(QUESTION))
    assert "".join(chunk.delta or "" for chunk in chunks) == whole
    assert chunks[-1].message.content == whole
    assert whole


@pytest.mark.proves(NAME, "tools")
def test_a_tool_is_called(server: Any) -> None:
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return f"Sunny in {city}."

    model = chat_model(server)
    asked: Any = {
        "tools": [FunctionTool.from_defaults(get_weather)],
        "user_msg": "What is the weather in Paris?",
        "tool_required": True,
    }
    (call, *_) = model.get_tool_calls_from_response(model.chat_with_tools(**asked))
    assert (call.tool_name, list(call.tool_kwargs)) == ("get_weather", ["city"])
    last = list(model.stream_chat_with_tools(**asked))[-1]
    (streamed, *_) = model.get_tool_calls_from_response(last)
    assert streamed.tool_kwargs == call.tool_kwargs


@pytest.mark.proves(NAME, "structured")
def test_an_answer_is_parsed(server: Any) -> None:
    structured = chat_model(server).as_structured_llm(City)
    question = ChatMessage(role="user", content="Tell me of the city of Paris, as JSON.")
    assert isinstance(structured.chat([question]).raw, City)


@pytest.mark.proves(NAME, "aborts")
def test_a_closed_stream_ends_the_answer(server: Any, expect_cancel: Any) -> None:
    model = chat_model(
        server, max_tokens=4000, additional_kwargs={"extra_body": {"ignore_eos": True}}
    )
    with expect_cancel():
        stream: Any = model.stream_chat(QUESTION)
        next(stream)
        stream.close()
        del stream
        gc.collect()  # the connection goes with the stream that it leaves behind


@pytest.mark.proves(NAME, "errors")
def test_errors_are_its_exceptions(server: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        chat_model(server, model="nope").chat(QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat_model(server, temperature=2.0, additional_kwargs={"temperature": 9}).chat(QUESTION)
