"""Structured output of the default model, through a real server and OpenAI's own client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"


class City(BaseModel):
    """What the answers must be; bounded, since so small a model may never stop."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=30)]
    population: Annotated[int, Field(ge=0, le=100_000_000)]
    languages: Annotated[list[Literal["French", "Norwegian", "English"]], Field(max_length=3)]


MESSAGES: Any = [{"role": "user", "content": "Tell me about Paris as JSON."}]
SCHEMA = {"name": "city", "schema": City.model_json_schema(), "strict": True}
FORMAT: Any = {"type": "json_schema", "json_schema": SCHEMA}


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 200, "seed": 3, **fields}
    return client.chat.completions.create(**body)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_json_of_its_schema_streamed_or_not(
    client: openai.OpenAI, temperature: float
) -> None:
    finished = 0
    for seed in range(3):
        fields = {"response_format": FORMAT, "temperature": temperature, "seed": seed}
        whole = ask(client, **fields).choices[0]
        chunks = [chunk.choices[0] for chunk in ask(client, **fields, stream=True)]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
        assert chunks[-1].finish_reason == whole.finish_reason
        if whole.finish_reason == "stop":
            City.model_validate_json(whole.message.content)
            finished += 1
    assert finished == 3


def test_the_clients_own_parsers(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=City, temperature=0, max_tokens=200
    )
    assert isinstance(parsed.choices[0].message.parsed, City)
    response = client.responses.parse(
        model=MODEL,
        input="Tell me about Oslo.",
        text_format=City,
        temperature=0,
        max_output_tokens=200,
    )
    assert isinstance(response.output_parsed, City)


def test_every_kind_of_grammar(client: openai.OpenAI) -> None:
    def text(**outputs: Any) -> str:
        answer = ask(client, temperature=1, extra_body={"structured_outputs": outputs})
        assert answer.choices[0].finish_reason == "stop"
        return str(answer.choices[0].message.content)

    assert text(choice=["positive", "negative"]) in {"positive", "negative"}
    assert re.fullmatch(r"\d{4}-\d\d", text(regex=r"\d{4}-\d\d"))
    assert text(grammar='start: "<" /[a-z]{3}/ ">"')[::4] == "<>"
    booleans = {"type": "array", "items": {"type": "boolean"}, "maxItems": 4}
    assert {type(item) for item in json.loads(text(json=booleans))} <= {bool}
    loose = ask(client, response_format={"type": "json_object"}, max_tokens=400, temperature=0)
    if loose.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(loose.choices[0].message.content), dict)


def test_a_bad_schema_is_refused_and_the_server_goes_on(client: openai.OpenAI) -> None:
    """The third takes a compiler half a minute, the last one overflows its stack."""
    chain = "".join(f'r{i}: "x" r{i + 1}\n' for i in range(3500))
    bombs: list[dict[str, Any]] = [
        {"json": {"type": "stsring"}},
        {"regex": "(?=a)"},
        {"json": {"type": "integer", "multipleOf": 999_983}},
        {"grammar": f'start: r0\n{chain}r3500: "y"'},
    ]
    for outputs in bombs:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, extra_body={"structured_outputs": outputs})
        assert str(refused.value.param).startswith("structured_outputs.")
    answer = ask(client, extra_body={"structured_outputs": {"choice": ["fine"]}})
    assert answer.choices[0].message.content == "fine"
