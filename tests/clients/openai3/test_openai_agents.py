"""OpenAI's Agents SDK, over chat completions and over responses."""

from __future__ import annotations

from typing import Any

import agents
import openai
import pytest
from openai.types.shared import Reasoning
from questions import ASK_NAME, HELLO, NAME, WEATHER, City, get_weather, user

CLIENT = "openai-agents (Python)"
APIS = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}
agents.set_tracing_disabled(True)  # it would send traces to OpenAI


@pytest.fixture(params=APIS)
def model(request: pytest.FixtureRequest, server: Any) -> Any:
    client = openai.AsyncOpenAI(base_url=server.openai_url, api_key="none", max_retries=0)
    return APIS[request.param](model=server.model, openai_client=client)


def agent_of(
    model: Any, *, settings: Any = None, name: str = "agent", **fields: Any
) -> agents.Agent:
    chosen = agents.ModelSettings(**{"temperature": 0} | (settings or {}))
    return agents.Agent(name=name, model=model, model_settings=chosen, **fields)


@pytest.mark.proves(CLIENT, "streams")
async def test_a_stream_is_the_answer(model: Any) -> None:
    agent = agent_of(model, instructions="Be brief.")
    whole = await agents.Runner.run(agent, HELLO)
    run = agents.Runner.run_streamed(agent, HELLO)
    text = ""
    async for event in run.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            text += event.data.delta
    assert text == run.final_output == whole.final_output
    assert text


@pytest.mark.proves(CLIENT, "tools", "turns")
@pytest.mark.parametrize("choice", ["required", "get_weather"])
async def test_a_tool_is_called_and_answered(model: Any, choice: str) -> None:
    """The loop: a forced call, its result, and an answer without force."""
    tool = agents.function_tool(get_weather)
    settings = {"tool_choice": choice, "parallel_tool_calls": False}
    run = await agents.Runner.run(agent_of(model, tools=[tool], settings=settings), WEATHER)
    kinds = [item.type for item in run.new_items]
    assert kinds[:2] == ["tool_call_item", "tool_call_output_item"]
    assert kinds[-1] == "message_output_item"
    assert run.new_items[1].output.startswith("Sunny in ")


@pytest.mark.proves(CLIENT, "tools")
async def test_an_agent_hands_over(model: Any) -> None:
    other = agent_of(model, name="other", handoff_description="knows cities", output_type=City)
    settings = {"tool_choice": "required", "parallel_tool_calls": False}
    run = await agents.Runner.run(agent_of(model, handoffs=[other], settings=settings), HELLO)
    assert run.last_agent.name == "other"


@pytest.mark.proves(CLIENT, "structured")
async def test_an_answer_is_parsed(model: Any) -> None:
    run = await agents.Runner.run(agent_of(model, output_type=City), "Tell me of Paris.")
    assert isinstance(run.final_output, City)


@pytest.mark.proves(CLIENT, "turns")
async def test_a_session_goes_on(model: Any) -> None:
    session = agents.SQLiteSession("a chat")
    await agents.Runner.run(agent_of(model), NAME, session=session)
    run = await agents.Runner.run(agent_of(model), ASK_NAME, session=session)
    assert run.final_output
    assert len(await session.get_items()) == 4


@pytest.mark.proves(CLIENT, "turns")
async def test_a_response_follows_another(server: Any) -> None:
    client = openai.AsyncOpenAI(base_url=server.openai_url, api_key="none", max_retries=0)
    agent = agent_of(agents.OpenAIResponsesModel(model=server.model, openai_client=client))
    first = await agents.Runner.run(agent, NAME)
    resent = await agents.Runner.run(agent, [*first.to_input_list(), user(ASK_NAME)])
    chained = await agents.Runner.run(agent, ASK_NAME, previous_response_id=first.last_response_id)
    assert chained.final_output == resent.final_output


@pytest.mark.proves(CLIENT, "streams")
async def test_the_settings_of_reasoning_models_pass(model: Any) -> None:
    settings = {
        "reasoning": Reasoning(effort="low"),
        "verbosity": "low",
        "store": False,
        "truncation": "auto",
        "include_usage": True,
        "metadata": {"a": "b"},
    }
    run = await agents.Runner.run(agent_of(model, settings=settings), HELLO)
    assert run.final_output


@pytest.mark.proves(CLIENT, "errors")
async def test_errors_are_its_exceptions(model: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await agents.Runner.run(agent_of(model, settings={"temperature": 9}), HELLO)
