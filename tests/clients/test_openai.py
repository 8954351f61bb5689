"""OpenAI's Python client, in the newest two of its major versions."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
from questions import ASK_NAME, CITY, COLOURS, NAME, PARAMETERS, STORY, WEATHER, City, user

PATIENCE = 300.0  # seconds: on a busy machine, all is slow
CLIENT = f"openai {openai.__version__.partition('.')[0]} (Python)"
FUNCTION: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": PARAMETERS,
}
TOOL: Any = {"type": "function", "function": FUNCTION}


@pytest.fixture
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0)


@pytest.mark.proves(CLIENT, "streams")
def test_a_stream_is_the_answer(client: Any, server: Any) -> None:
    asked: Any = {"messages": [user(COLOURS)], "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(model=server.model, **asked)
    stream = client.chat.completions.create(
        model=server.model, **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    completion = client.completions.create(model=server.model, prompt="One, two,", max_tokens=5)
    assert completion.choices[0].finish_reason == "length"


@pytest.mark.proves(CLIENT, "streams")
def test_a_response_streams(client: Any, server: Any) -> None:
    asked: Any = {"model": server.model, "input": COLOURS, "temperature": 0}
    whole = client.responses.create(**asked, max_output_tokens=20)
    with client.responses.stream(**asked, max_output_tokens=20) as stream:
        deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert whole.output_text


@pytest.mark.proves(CLIENT, "tools", "turns")
def test_a_tool_is_called(client: Any, server: Any) -> None:
    asked: Any = {
        "model": server.model,
        "messages": [user(WEATHER)],
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert list(json.loads(call.function.arguments)) == ["city"]

    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls[0]
    assert streamed.function.arguments == call.function.arguments

    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."}
    history = [*asked["messages"], choice.message, result]
    answer = client.chat.completions.create(
        model=server.model, messages=history, tools=[TOOL], tool_choice="none", max_tokens=40
    )
    assert answer.choices[0].message.content


@pytest.mark.proves(CLIENT, "tools")
def test_a_named_tool_is_called_once(client: Any, server: Any) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    whole = client.chat.completions.create(
        model=server.model, messages=[user(WEATHER)], tools=[TOOL], tool_choice=named, temperature=0
    )
    (call,) = whole.choices[0].message.tool_calls
    assert list(json.loads(call.function.arguments)) == ["city"]


@pytest.mark.proves(CLIENT, "tools", "turns")
def test_a_response_calls_a_tool(client: Any, server: Any) -> None:
    tool: Any = {"type": "function", "strict": True, **FUNCTION}
    asked: Any = {"model": server.model, "tools": [tool], "temperature": 0}
    first = client.responses.create(**asked, input=WEATHER, tool_choice=named(tool))
    (call,) = first.output
    assert (call.type, list(json.loads(call.arguments))) == ("function_call", ["city"])

    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    history = [user(WEATHER), *first.output, result]
    again = client.responses.create(
        **asked, input=history, tool_choice="none", max_output_tokens=20
    )
    assert again.output_text


def named(tool: Any) -> Any:
    return {"type": "function", "name": tool["name"]}


@pytest.mark.proves(CLIENT, "structured")
def test_an_answer_is_parsed(client: Any, server: Any) -> None:
    parsed = client.chat.completions.parse(
        model=server.model,
        messages=[user(CITY)],
        response_format=City,
        temperature=0,
        max_tokens=200,
    )
    assert isinstance(parsed.choices[0].message.parsed, City)
    response = client.responses.parse(
        model=server.model, input=CITY, text_format=City, temperature=0, max_output_tokens=200
    )
    assert response.output_parsed == parsed.choices[0].message.parsed


@pytest.mark.proves(CLIENT, "turns")
def test_a_response_follows_another(client: Any, server: Any) -> None:
    asked: Any = {"model": server.model, "temperature": 0, "max_output_tokens": 20}
    first = client.responses.create(**asked, input=NAME)
    chained = client.responses.create(**asked, input=ASK_NAME, previous_response_id=first.id)
    resent = client.responses.create(**asked, input=[user(NAME), *first.output, user(ASK_NAME)])
    assert chained.output_text == resent.output_text
    assert chained.previous_response_id == first.id
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**asked, input=ASK_NAME, previous_response_id=first.id)


@pytest.mark.proves(CLIENT, "aborts")
def test_a_closed_stream_ends_the_answer(client: Any, server: Any, expect_cancel: Any) -> None:
    asked: Any = {"messages": [user(STORY)], "max_tokens": 4000}
    asked["extra_body"] = {"ignore_eos": True}
    with (
        expect_cancel(),
        client.chat.completions.create(**asked, model=server.model, stream=True) as stream,
    ):
        next(iter(stream))


@pytest.mark.proves(CLIENT, "errors")
def test_errors_are_its_exceptions(client: Any, server: Any) -> None:
    messages = [user(COLOURS)]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.chat.completions.create(model=server.model, messages=messages, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.001).chat.completions.create(
            model=server.model, messages=messages
        )


@pytest.mark.proves(CLIENT, "batches")
def test_a_batch_has_the_answers_of_its_lines(client: Any, server: Any) -> None:
    bodies = [
        {"model": server.model, "messages": [user(text)], "temperature": 0, "max_tokens": 5}
        for text in (COLOURS, STORY, WEATHER)
    ]
    url = "/v1/chat/completions"
    lines = [
        json.dumps({"custom_id": f"{k}", "method": "POST", "url": url, "body": body})
        for k, body in enumerate(bodies)
    ]
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    assert file.id in [each.id for each in client.files.list(purpose="batch")]
    batch = client.batches.create(
        input_file_id=file.id, endpoint=url, completion_window="24h", metadata={"name": "three"}
    )
    ends = time.monotonic() + PATIENCE
    while batch.status not in {"completed", "failed", "expired"}:
        assert time.monotonic() < ends, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 3)
    assert batch.metadata == {"name": "three"}
    assert batch.id in [each.id for each in client.batches.list(limit=1)]
    rows = [json.loads(row) for row in client.files.content(batch.output_file_id).text.splitlines()]
    for row, body in zip(rows, bodies, strict=True):
        online = client.chat.completions.create(**body)
        answer = row["response"]["body"]["choices"][0]["message"]["content"]
        assert answer == online.choices[0].message.content
    assert client.batches.cancel(batch.id).status == "completed"
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
