"""Simon Willison's llm: an OpenAI-compatible server from its extra-openai-models.yaml."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from questions import ASK_NAME, CITY, COLOURS, HELLO, NAME, STORY, WEATHER, City, get_weather

CLIENT = "llm"


@pytest.fixture
def model(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    fields = {
        "model_id": "quire",
        "model_name": server.model,
        "api_base": server.openai_url,
        "supports_schema": True,
        "supports_tools": True,
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    text = "- " + "\n  ".join(lines)
    (tmp_path / "extra-openai-models.yaml").write_text(text + "\n")
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    import llm  # it reads its folder when it lists models

    found = llm.get_model("quire")
    found.key = "none"
    return found


@pytest.mark.proves(CLIENT, "streams")
def test_a_stream_is_the_answer(model: Any) -> None:
    options = {"temperature": 0, "max_tokens": 40}
    whole = model.prompt(COLOURS, stream=False, **options).text()
    assert "".join(model.prompt(COLOURS, **options)) == whole
    assert whole


@pytest.mark.proves(CLIENT, "structured")
def test_an_answer_follows_a_schema(model: Any) -> None:
    schema = City.model_json_schema() | {"additionalProperties": False}
    response = model.prompt(CITY, schema=schema, temperature=0, max_tokens=200)
    City.model_validate_json(response.text())


@pytest.mark.proves(CLIENT, "tools")
def test_tools_are_offered(model: Any) -> None:
    """It cannot force a call: the test shows that a chat with tools is accepted."""
    chat = model.conversation(tools=[get_weather])
    chain = chat.chain(WEATHER, chain_limit=3, options={"max_tokens": 200, "temperature": 0})
    assert isinstance(chain.text(), str)


@pytest.mark.proves(CLIENT, "turns")
def test_a_chat_goes_on(model: Any) -> None:
    chat = model.conversation()
    first = chat.prompt(NAME, max_tokens=20, temperature=0)
    assert first.text()
    second = chat.prompt(ASK_NAME, max_tokens=20, temperature=0)
    assert second.text()
    assert second.usage().input > first.usage().input


@pytest.mark.proves(CLIENT, "aborts")
def test_a_closed_stream_ends_the_answer(model: Any, expect_cancel: Any) -> None:
    with expect_cancel():
        stream = iter(model.prompt(STORY, max_tokens=4000, temperature=0))
        next(stream)
        stream.close()
        del stream
        gc.collect()  # the connection goes with the stream that it leaves behind


@pytest.mark.proves(CLIENT, "errors")
def test_errors_are_its_exceptions(model: Any) -> None:
    model.model_name = "nope"
    with pytest.raises(openai.NotFoundError):
        model.prompt(HELLO).text()
