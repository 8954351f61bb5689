"""instructor: each of its modes for OpenAI, and the retry after an invalid answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import instructor
import openai
import pytest
from instructor import Mode
from instructor.core import InstructorRetryException
from pydantic import BaseModel, field_validator
from questions import user

CLIENT = "instructor"
MODES = [
    Mode.TOOLS,
    Mode.TOOLS_STRICT,
    Mode.FUNCTIONS,
    Mode.JSON,
    Mode.JSON_O1,
    Mode.JSON_SCHEMA,
    Mode.MD_JSON,
    Mode.RESPONSES_TOOLS,
    Mode.RESPONSES_TOOLS_WITH_INBUILT_TOOLS,
]
# JSON and MD_JSON do not constrain the answer by the schema: examples show it to the model.
EXAMPLE = '{"name": "Rome", "country": "Italy"}'
EXAMPLES = [
    user("Rome, as JSON"),
    {"role": "assistant", "content": EXAMPLE},
    user("Rome, as JSON, again"),
    {"role": "assistant", "content": EXAMPLE},
    user("Rome, as JSON, please"),
]


class City(BaseModel):
    """A city."""

    name: str
    country: str


def client_of(server: Any, mode: Mode) -> Any:
    client = openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0)
    return instructor.from_openai(client, mode=mode)


def asked(server: Any, mode: Mode, **fields: Any) -> dict[str, Any]:
    limit = "max_output_tokens" if "RESPONSES" in mode.name else "max_tokens"
    options = {"model": server.model, "messages": EXAMPLES, "temperature": 0, limit: 200}
    return options | {"max_retries": 0} | fields


@pytest.mark.proves(CLIENT, "structured")
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_an_answer_is_parsed(server: Any, mode: Mode) -> None:
    found = client_of(server, mode).create(response_model=City, **asked(server, mode))
    assert isinstance(found, City)


@pytest.mark.proves(CLIENT, "streams")
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_a_partial_answer_streams(server: Any, mode: Mode) -> None:
    client = client_of(server, mode)
    partial = list(client.create_partial(response_model=City, **asked(server, mode)))
    assert len(partial) > 1
    City.model_validate(partial[-1].model_dump())


@pytest.mark.proves(CLIENT, "tools")
def test_parallel_calls_are_parsed(server: Any) -> None:
    """The mode itself leaves it to the model whether it calls."""
    forced = {"tool_choice": "required"}  # instructor asks for auto
    options = asked(server, Mode.PARALLEL_TOOLS, extra_body=forced, max_tokens=1000)
    client = client_of(server, Mode.PARALLEL_TOOLS)
    found = list(client.create(response_model=Iterable[City], **options))
    assert found
    assert all(isinstance(city, City) for city in found)


@pytest.mark.proves(CLIENT, "turns")
@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS], ids=str)
def test_an_invalid_answer_is_asked_for_again(server: Any, mode: Mode) -> None:
    """The second request has the first answer and its error in the history."""
    attempts = 0

    class Refused(City):
        @field_validator("name")
        @classmethod
        def refuse(cls, _name: str) -> str:
            nonlocal attempts
            attempts += 1
            raise ValueError("the city is not the one")

    with pytest.raises(InstructorRetryException, match="the city is not the one"):
        client_of(server, mode).create(response_model=Refused, **asked(server, mode, max_retries=2))
    assert attempts > 1


@pytest.mark.proves(CLIENT, "errors")
def test_errors_are_its_exceptions(server: Any) -> None:
    client = client_of(server, Mode.TOOLS)
    with pytest.raises(InstructorRetryException, match="temperature"):
        client.create(response_model=City, **asked(server, Mode.TOOLS, temperature=9))
