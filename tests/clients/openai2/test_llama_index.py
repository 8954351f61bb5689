"""llama-index: its OpenAI-like model."""

from __future__ import annotations

import gc
from typing import Any

import openai
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from questions import ASK_NAME, CITY, COLOURS, NAME, STORY, WEATHER, City, get_weather

CLIENT = "llama-index"


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


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


QUESTION = [user(COLOURS)]


@pytest.mark.proves(CLIENT, "streams")
def test_a_stream_is_the_answer(server: Any) -> None:
    model = chat_model(server, max_tokens=40)
    whole = model.chat(QUESTION).message.content
    chunks = list(model.stream_chat(QUESTION))
    assert "".join(chunk.delta or "" for chunk in chunks) == whole
    assert chunks[-1].message.content == whole
    assert whole


@pytest.mark.proves(CLIENT, "tools")
def test_a_tool_is_called(server: Any) -> None:
    model = chat_model(server)
    asked: Any = {
        "tools": [FunctionTool.from_defaults(get_weather)],
        "user_msg": WEATHER,
        "tool_required": True,
    }
    (call, *_) = model.get_tool_calls_from_response(model.chat_with_tools(**asked))
    assert (call.tool_name, list(call.tool_kwargs)) == ("get_weather", ["city"])
    last = list(model.stream_chat_with_tools(**asked))[-1]
    (streamed, *_) = model.get_tool_calls_from_response(last)
    assert streamed.tool_kwargs == call.tool_kwargs


@pytest.mark.proves(CLIENT, "structured")
def test_an_answer_is_parsed(server: Any) -> None:
    structured = chat_model(server).as_structured_llm(City)
    assert isinstance(structured.chat([user(CITY)]).raw, City)


@pytest.mark.proves(CLIENT, "tools", "turns")
def test_a_chat_goes_on(server: Any) -> None:
    """After a call and its result, as llama-index returns and sends them."""
    model = chat_model(server)
    tool = FunctionTool.from_defaults(get_weather)
    history = [user(NAME), model.chat([user(NAME)]).message, user(WEATHER)]
    forced = model.chat_with_tools([tool], chat_history=history, tool_choice="get_weather")
    (call,) = model.get_tool_calls_from_response(forced)
    result = ChatMessage(
        role="tool",
        content=str(tool(**call.tool_kwargs)),
        additional_kwargs={"tool_call_id": call.tool_id},
    )
    history += [forced.message, result, user(ASK_NAME)]
    assert model.chat(history).message.content


@pytest.mark.proves(CLIENT, "aborts")
def test_a_closed_stream_ends_the_answer(server: Any, expect_cancel: Any) -> None:
    model = chat_model(
        server, max_tokens=4000, additional_kwargs={"extra_body": {"ignore_eos": True}}
    )
    with expect_cancel():
        stream: Any = model.stream_chat([user(STORY)])
        next(stream)
        stream.close()
        del stream
        gc.collect()  # the connection goes with the stream that it leaves behind


@pytest.mark.proves(CLIENT, "errors")
def test_errors_are_its_exceptions(server: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        chat_model(server, model="nope").chat(QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat_model(server, temperature=2.0, additional_kwargs={"temperature": 9}).chat(QUESTION)
