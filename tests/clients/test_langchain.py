"""langchain-openai: what an application does with it, and LangChain's own standard suite."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from pydantic import BaseModel

NAME = "langchain-openai"


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    capital: bool


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}."


def chat_model(server: Any, **fields: Any) -> ChatOpenAI:
    options = {"temperature": 0, "max_tokens": 200, "max_retries": 0} | fields
    return ChatOpenAI(base_url=server.openai_url, api_key="none", model=server.model, **options)


@pytest.mark.proves(NAME, "streams")
def test_a_stream_is_the_answer(server: Any) -> None:
    model = chat_model(server, max_tokens=40)
    whole = model.invoke("Name three colours.")
    chunks = list(model.stream("Name three colours."))
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert whole.content
    assert whole.usage_metadata is not None


@pytest.mark.proves(NAME, "tools")
def test_a_tool_is_called(server: Any) -> None:
    model = chat_model(server)
    bound = model.bind_tools([get_weather], tool_choice="any")
    question = HumanMessage("What is the weather in Paris?")
    answer = bound.invoke([question])
    assert isinstance(answer, AIMessage)
    call = answer.tool_calls[0]
    assert (call["name"], list(call["args"])) == ("get_weather", ["city"])
    whole: Any = None
    for chunk in bound.stream([question]):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == call["args"]
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.invoke([question, answer, result]).content


@pytest.mark.proves(NAME, "structured")
def test_an_answer_is_parsed(server: Any) -> None:
    model = chat_model(server).with_structured_output(City, method="json_schema")
    assert isinstance(model.invoke("Tell me of the city of Paris, as JSON."), City)


@pytest.mark.proves(NAME, "aborts")
def test_a_closed_stream_ends_the_answer(server: Any, expect_cancel: Any) -> None:
    model = chat_model(server, max_tokens=4000, extra_body={"ignore_eos": True})
    with expect_cancel():
        stream: Any = model.stream("Tell me a story.")
        next(stream)
        stream.close()


@pytest.mark.proves(NAME, "errors")
def test_errors_are_its_exceptions(server: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        chat_model(server).invoke("hello", model="nope")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat_model(server, temperature=9).invoke("hello")


def needs(what: str) -> Any:
    """Of a test that the server passes with a model that can do this; the default one may not."""
    return pytest.mark.xfail(reason=f"a model of 135M parameters need not {what}", strict=False)


@pytest.mark.proves(NAME)
class TestStandard(ChatModelIntegrationTests):
    """LangChain's own tests of a chat model. What the default model can do is declared."""

    @pytest.fixture(autouse=True)
    def _find(self, server: Any) -> None:
        self._server = server

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "base_url": self._server.openai_url,
            "api_key": "none",
            "model": self._server.model,
            "temperature": 0,
            "max_tokens": 300,
            "max_retries": 0,
            "stream_usage": True,
            "extra_body": {"repetition_penalty": 1.3},  # a small model comes to no end without
        }

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return False  # one model is served

    @needs("find the argument in the question")
    def test_tool_calling(self, model: Any) -> None:
        super().test_tool_calling(model)

    @needs("find the argument in the question")
    async def test_tool_calling_async(self, model: Any) -> None:
        await super().test_tool_calling_async(model)

    @needs("stop after one call")
    def test_tool_calling_with_no_arguments(self, model: Any) -> None:
        super().test_tool_calling_with_no_arguments(model)

    @needs("know the keys that nobody told it")
    def test_json_mode(self, model: Any) -> None:
        super().test_json_mode(model)

    @needs("come to the end of a text")
    def test_structured_output_optional_param(self, model: Any) -> None:
        super().test_structured_output_optional_param(model)

    @needs("come to the end of a text")
    def test_unicode_tool_call_integration(self, model: Any, **options: Any) -> None:
        super().test_unicode_tool_call_integration(model, **options)

    @needs("call a tool of its own accord")
    def test_agent_loop(self, model: Any) -> None:
        super().test_agent_loop(model)
