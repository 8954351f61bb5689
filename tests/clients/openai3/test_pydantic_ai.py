"""pydantic-ai, over chat completions, responses and Anthropic's messages."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.direct import model_request, model_request_stream
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelRequest, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition
from questions import ASK_NAME, CITY, COLOURS, HELLO, NAME, PARAMETERS, WEATHER, City

CLIENT = "pydantic-ai"
BRIEF: Any = {"temperature": 0, "max_tokens": 40}
LONG: Any = {"temperature": 0, "max_tokens": 200, "parallel_tool_calls": False}
TOOL = ToolDefinition(
    name="get_weather", description="The weather of a city.", parameters_json_schema=PARAMETERS
)


@pytest.fixture(params=["chat", "responses", "messages"])
def model(request: pytest.FixtureRequest, server: Any) -> Any:
    if request.param == "messages":
        anthropic = AnthropicProvider(base_url=server.url, api_key="none")
        profile = ModelProfile(supports_json_schema_output=True)  # it asks for the model's name
        return AnthropicModel(server.model, provider=anthropic, profile=profile)
    provider = OpenAIProvider(base_url=server.openai_url, api_key="none")
    kind = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel
    return kind(server.model, provider=provider)


@pytest.mark.proves(CLIENT, "streams")
async def test_a_stream_is_the_answer(model: Any) -> None:
    agent = Agent(model, instructions="Be brief.", model_settings=BRIEF)
    whole = await agent.run(COLOURS)
    async with agent.run_stream(COLOURS) as stream:
        text = "".join([delta async for delta in stream.stream_text(delta=True)])
    assert text == whole.output
    assert text
    assert stream.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.proves(CLIENT, "tools", "turns")
async def test_a_tool_is_called(model: Any) -> None:
    forced = ModelRequestParameters(function_tools=[TOOL], allow_text_output=False)
    asked: Any = {"model_request_parameters": forced, "model_settings": LONG}
    history: list[Any] = [ModelRequest.user_text_prompt(WEATHER)]
    whole = await model_request(model, history, **asked)
    (call,) = whole.parts
    assert isinstance(call, ToolCallPart)
    assert (call.tool_name, list(call.args_as_dict())) == ("get_weather", ["city"])
    async with model_request_stream(model, history, **asked) as stream:
        async for _ in stream:
            pass
    (streamed,) = stream.get().parts
    assert streamed.args_as_dict() == call.args_as_dict()

    result = ToolReturnPart(
        tool_name=call.tool_name, content="Sunny.", tool_call_id=call.tool_call_id
    )
    history += [whole, ModelRequest(parts=[result])]
    answer = await model_request(model, history, model_settings=BRIEF)
    assert isinstance(answer.parts[0], TextPart)


@pytest.mark.proves(CLIENT, "structured")
@pytest.mark.parametrize("form", [NativeOutput, ToolOutput])
async def test_an_answer_is_parsed(model: Any, form: Any) -> None:
    agent = Agent(model, output_type=form(City), model_settings=LONG)
    whole = await agent.run(CITY)
    assert isinstance(whole.output, City)
    async with agent.run_stream(CITY) as stream:
        assert await stream.get_output() == whole.output


@pytest.mark.proves(CLIENT, "turns")
async def test_a_chat_goes_on(model: Any) -> None:
    agent = Agent(model, model_settings=BRIEF)
    first = await agent.run(NAME)
    second = await agent.run(ASK_NAME, message_history=first.all_messages())
    assert second.output
    assert second.usage.input_tokens > first.usage.input_tokens


@pytest.mark.proves(CLIENT, "streams")
async def test_the_setting_for_thinking_passes(model: Any) -> None:
    agent = Agent(model, model_settings={"temperature": 0, "max_tokens": 2000, "thinking": "low"})
    assert (await agent.run(HELLO)).output


@pytest.mark.proves(CLIENT, "errors")
async def test_errors_are_its_exceptions(model: Any) -> None:
    with pytest.raises(ModelHTTPError, match="temperature") as refused:
        await Agent(model, model_settings={"temperature": 9}).run(HELLO)
    assert refused.value.status_code == 400
