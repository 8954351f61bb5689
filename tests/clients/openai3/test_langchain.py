"""langchain-openai: what an application does with it, and LangChain's own standard suite."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from questions import ASK_NAME, CITY, COLOURS, HELLO, NAME, STORY, WEATHER, City, get_weather

CLIENT = "langchain-openai"
TOOL = tool(get_weather)


def chat_model(server: Any, **fields: Any) -> ChatOpenAI:
    options = {"temperature": 0, "max_tokens": 200, "max_retries": 0} | fields
    return ChatOpenAI(base_url=server.openai_url, api_key="none", model=server.model, **options)


@pytest.mark.proves(CLIENT, "streams")
def test_a_stream_is_the_answer(server: Any) -> None:
    model = chat_model(server, max_tokens=40)
    whole = model.invoke(COLOURS)
    chunks = list(model.stream(COLOURS))
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert whole.content
    assert whole.usage_metadata is not None


@pytest.mark.proves(CLIENT, "tools")
def test_a_tool_is_called(server: Any) -> None:
    model = chat_model(server)
    bound = model.bind_tools([TOOL], tool_choice="any")
    question = HumanMessage(WEATHER)
    answer = bound.invoke([question])
    assert isinstance(answer, AIMessage)
    call = answer.tool_calls[0]
    assert (call["name"], list(call["args"])) == ("get_weather", ["city"])
    whole: Any = None
    for chunk in bound.stream([question]):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == call["args"]
    result = TOOL.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.invoke([question, answer, result]).content


@pytest.mark.proves(CLIENT, "structured")
def test_an_answer_is_parsed(server: Any) -> None:
    model = chat_model(server).with_structured_output(City, method="json_schema")
    assert isinstance(model.invoke(CITY), City)


@pytest.mark.proves(CLIENT, "streams", "tools", "turns")
def test_responses_do_the_same(server: Any) -> None:
    model = chat_model(server, use_responses_api=True)
    whole = model.invoke(HELLO)
    assert "".join(chunk.text for chunk in model.stream(HELLO)) == whole.text
    bound = model.bind_tools([TOOL], tool_choice="get_weather")
    question = HumanMessage(WEATHER)
    answer = bound.invoke([question])
    (call,) = answer.tool_calls
    assert list(call["args"]) == ["city"]
    assert model.invoke([question, answer, TOOL.invoke(call)]).text
    assert isinstance(model.with_structured_output(City).invoke(CITY), City)


@pytest.mark.proves(CLIENT, "turns")
def test_a_response_follows_another(server: Any) -> None:
    model = chat_model(server, use_responses_api=True, use_previous_response_id=True)
    history: list[Any] = [HumanMessage(NAME)]
    history += [model.invoke(history), HumanMessage(ASK_NAME)]
    again = model.invoke(history)
    assert again.text
    assert again.usage_metadata["input_tokens"] > history[1].usage_metadata["total_tokens"]


@pytest.mark.proves(CLIENT, "aborts")
def test_a_closed_stream_ends_the_answer(server: Any, expect_cancel: Any) -> None:
    model = chat_model(server, max_tokens=4000, extra_body={"ignore_eos": True})
    with expect_cancel():
        stream: Any = model.stream(STORY)
        next(stream)
        stream.close()


@pytest.mark.proves(CLIENT, "errors")
def test_errors_are_its_exceptions(server: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        chat_model(server).invoke(HELLO, model="nope")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat_model(server, temperature=9).invoke(HELLO)


def needs(what: str) -> Any:
    """Of a test that the server passes with a model that can do this; the default one may not."""
    return pytest.mark.xfail(reason=f"a model of 135M parameters need not {what}", strict=False)


@pytest.mark.proves(CLIENT)
class TestStandard(ChatModelIntegrationTests):
    """LangChain's own tests of a chat model. What the default model can do is declared."""

    @pytest.fixture(autouse=True)
    def _prepare(self, server: Any, request: pytest.FixtureRequest) -> None:
        """A small model may repeat itself in a text or an argument and never end it; the penalty
        prevents it, and also that arguments repeat what the question says.
        """
        self._server = server
        long = "structured_output" in request.node.name or "tool_choice" in request.node.name
        self._penalty = 1.1 if long else 1.0

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
            "max_tokens": 120,
            "max_retries": 0,
            "stream_usage": True,
            "extra_body": {"repetition_penalty": self._penalty, "parallel_tool_calls": False},
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
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return str(self._server.model)  # one model is served

    @needs("leave out arguments that the schema does not name and does not exclude")
    def test_tool_calling_with_no_arguments(self, model: Any) -> None:
        super().test_tool_calling_with_no_arguments(model)

    @needs("follow a schema that is in the prompt alone")
    def test_json_mode(self, model: Any) -> None:
        super().test_json_mode(model)

    @needs("call a tool of its own accord")
    def test_agent_loop(self, model: Any) -> None:
        super().test_agent_loop(model)
