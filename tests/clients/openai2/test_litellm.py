"""litellm, as a library: the provider for OpenAI-compatible servers."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import litellm
import pytest
from questions import ASK_NAME, CITY, COLOURS, HELLO, NAME, PARAMETERS, STORY, WEATHER, City, user

PATIENCE = 300.0  # seconds: on a busy machine, all is slow
CLIENT = "litellm"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": PARAMETERS,
    },
}


def asked(server: Any, text: str, **fields: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": f"openai/{server.model}",
        "api_base": server.openai_url,
        "api_key": "none",
        "messages": [user(text)],
        "temperature": 0,
        "max_tokens": 200,
        "num_retries": 0,
        "max_retries": 0,
    }
    return options | fields


@pytest.mark.proves(CLIENT, "streams")
def test_a_stream_is_the_answer(server: Any) -> None:
    options = asked(server, COLOURS, max_tokens=40)
    whole: Any = litellm.completion(**options)
    chunks: list[Any] = list(litellm.completion(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert text
    rebuilt: Any = litellm.stream_chunk_builder(chunks)
    assert rebuilt.choices[0].message.content == text


@pytest.mark.proves(CLIENT, "tools")
def test_a_tool_is_called(server: Any) -> None:
    options = asked(server, WEATHER, tools=[TOOL], tool_choice="required")
    whole: Any = litellm.completion(**options)
    call = whole.choices[0].message.tool_calls[0].function
    assert (call.name, list(json.loads(call.arguments))) == ("get_weather", ["city"])
    rebuilt: Any = litellm.stream_chunk_builder(list(litellm.completion(**options, stream=True)))
    assert rebuilt.choices[0].message.tool_calls[0].function.arguments == call.arguments


@pytest.mark.proves(CLIENT, "turns")
def test_a_chat_goes_on(server: Any) -> None:
    """After a call and its result, as litellm returns and sends them."""
    options = asked(server, NAME, max_tokens=20)
    first: Any = litellm.completion(**options)
    options["messages"] += [first.choices[0].message, user(WEATHER)]
    forced: Any = litellm.completion(
        **options | {"max_tokens": 200},
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )
    (call,) = forced.choices[0].message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    options["messages"] += [forced.choices[0].message, result, user(ASK_NAME)]
    last: Any = litellm.completion(**options, tools=[TOOL], tool_choice="none")
    assert last.choices[0].message.content


@pytest.mark.proves(CLIENT, "streams")
def test_a_response_streams(server: Any) -> None:
    asking: Any = {"model": f"openai/{server.model}", "api_base": server.openai_url}
    asking |= {"api_key": "none", "input": HELLO, "temperature": 0}
    whole: Any = litellm.responses(**asking)
    events = list(litellm.responses(**asking, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert whole.output_text


@pytest.mark.proves(CLIENT, "structured")
def test_an_answer_follows_a_schema(server: Any) -> None:
    options = asked(server, CITY, response_format=City)
    whole: Any = litellm.completion(**options)
    City.model_validate_json(whole.choices[0].message.content)


@pytest.mark.proves(CLIENT, "aborts")
def test_a_closed_stream_ends_the_answer(server: Any, expect_cancel: Any) -> None:
    options = asked(server, STORY, max_tokens=4000, extra_body={"ignore_eos": True})

    async def give_up() -> None:
        stream: Any = await litellm.acompletion(**options, stream=True)
        await anext(stream)
        await stream.aclose()

    with expect_cancel():
        asyncio.run(give_up())


@pytest.mark.proves(CLIENT, "errors")
def test_errors_are_its_exceptions(server: Any) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked(server, HELLO, model="openai/nope"))
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked(server, HELLO, temperature=9))


@pytest.mark.proves(CLIENT, "streams")
def test_it_speaks_anthropics_shape_too(server: Any) -> None:
    options = asked(server, "Name a colour.", model=f"anthropic/{server.model}", max_tokens=20)
    options["api_base"] = server.url
    whole: Any = litellm.completion(**options)
    chunks: list[Any] = list(litellm.completion(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


@pytest.mark.proves(CLIENT, "batches")
def test_a_batch_has_the_answers_of_its_lines(server: Any, tmp_path: Path) -> None:
    body = {"model": server.model, "messages": [user(COLOURS)], "temperature": 0, "max_tokens": 5}
    url = "/v1/chat/completions"
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}))
    place: dict[str, Any] = {
        "custom_llm_provider": "openai",
        "api_base": server.openai_url,
        "api_key": "none",
    }
    with path.open("rb") as content:
        file: Any = litellm.create_file(file=content, purpose="batch", **place)
    batch: Any = litellm.create_batch(
        completion_window="24h", endpoint=url, input_file_id=file.id, **place
    )
    ends = time.monotonic() + PATIENCE
    while batch.status not in {"completed", "failed", "expired"}:
        assert time.monotonic() < ends, batch
        time.sleep(0.1)
        batch = litellm.retrieve_batch(batch_id=batch.id, **place)
    assert (batch.status, batch.request_counts.completed) == ("completed", 1)
    found: Any = litellm.file_content(file_id=batch.output_file_id, **place)
    row = json.loads(found.text)
    online: Any = litellm.completion(**asked(server, COLOURS, max_tokens=5))
    answer = row["response"]["body"]["choices"][0]["message"]["content"]
    assert answer == online.choices[0].message.content
