"""Simon Willison's llm: an OpenAI-compatible server from its extra-openai-models.yaml."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any, Literal

import openai
import pytest

NAME = "llm"


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


@pytest.mark.proves(NAME, "streams")
def test_a_stream_is_the_answer(model: Any) -> None:
    options = {"temperature": 0, "max_tokens": 40}
    whole = model.prompt("Name three colours.", stream=False, **options).text()
    assert "".join(model.prompt("Name three colours.", **options)) == whole
    assert whole


@pytest.mark.proves(NAME, "structured")
def test_an_answer_follows_a_schema(model: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Paris", "Rome"]}, "capital": {"type": "boolean"}},
        "required": ["name", "capital"],
        "additionalProperties": False,
    }
    response = model.prompt(
        "Tell me of the city of Paris, as JSON.", schema=schema, temperature=0, max_tokens=200
    )
    assert set(json.loads(response.text())) == {"name", "capital"}


@pytest.mark.proves(NAME, "tools")
def test_tools_are_offered(model: Any) -> None:
    """It has no way to force a call, so what is shown is that a chat with tools goes through."""

    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        return f"Sunny in {city}."

    chat = model.conversation(tools=[get_weather])
    chain = chat.chain("What is the weather in Paris?", chain_limit=3, options={"max_tokens": 200})
    assert isinstance(chain.text(), str)


@pytest.mark.proves(NAME, "aborts")
def test_a_closed_stream_ends_the_answer(model: Any, expect_cancel: Any) -> None:
    with expect_cancel():
        stream = iter(model.prompt("Tell me a very long story.", max_tokens=4000, temperature=0))
        next(stream)
        stream.close()
        del stream
        gc.collect()  # the connection goes with the stream that it leaves behind


@pytest.mark.proves(NAME, "errors")
def test_errors_are_its_exceptions(model: Any) -> None:
    model.model_name = "nope"
    with pytest.raises(openai.NotFoundError):
        model.prompt("hello").text()
