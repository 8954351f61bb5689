"""Reasoning in responses, from the request to the answer and back into the next request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.text.tokenizer import Tokenizer
from service.api.structured.validator import GrammarValidator
from service.messages import FinishReason
from tests.api.conftest import validator_of
from tests.api.test_reasoning import HYBRID, TAGS, make_tokenizer

URL = "/v1/responses"
B: dict[str, Any] = {"input": "2 + 2?", "max_output_tokens": 64}
ANSWER = "<think>\nhm é</think>\n\n4"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of a model that opens its thinking itself."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer(folder, HYBRID, TAGS["think"], "none")


@pytest.fixture(scope="module")
def grammar_validator(tokenizer: Tokenizer) -> Iterator[GrammarValidator]:
    """Of this tokenizer: it starts no process, as no test here has a grammar."""
    with validator_of(tokenizer) as validator:
        yield validator


@pytest.fixture
def thinker(service: Any) -> Any:
    service.engine.end = FinishReason.STOP
    service.engine.script = lambda _: service.tokenizer.encode(ANSWER, add_bos=False)
    return service


async def test_a_stream_resumes_within_the_reasoning(thinker: Any, read_events: Any) -> None:
    body = B | {"stream": True, "reasoning": {"summary": "auto"}}
    events = read_events((await thinker.post(URL, body)).content)
    final = events[-1]["response"]
    reasoning, message = final["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm é"}]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "hm é"}]
    assert message["content"][0]["text"] == "4"
    assert final["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    path = f"{URL}/{final['id']}"
    assert (await thinker.client.get(path)).json() == final
    for index, event in enumerate(events):
        options = {"stream": "true", "starting_after": event["sequence_number"]}
        rest = await thinker.client.get(path, params=options)
        assert read_events(rest.content) == events[index + 1 :]


async def test_reasoning_comes_back(thinker: Any) -> None:
    """In a chain, as an item, or sealed: the next prompt is the same."""
    include = {"include": ["reasoning.encrypted_content"]}
    first = (await thinker.post(URL, B | include)).json()
    reasoning, message = first["output"]
    sealed: dict[str, Any] = {"type": "reasoning", "summary": [], "content": None}
    sealed["encrypted_content"] = reasoning["encrypted_content"]
    before = [{"role": "user", "content": B["input"]}]
    bodies = [
        {"input": "and?", "previous_response_id": first["id"]},
        *(
            {"input": [*before, item, message, {"role": "user", "content": "and?"}]}
            for item in (reasoning, sealed)
        ),
    ]
    for body in bodies:
        assert (await thinker.post(URL, B | body)).status_code == 200
    chained, plain, unsealed = thinker.engine.seen[1:]
    assert chained.prompt_ids == plain.prompt_ids == unsealed.prompt_ids
    assert "hm é" in thinker.tokenizer.decode(chained.prompt_ids)


async def test_thinking_is_switched_off(thinker: Any) -> None:
    for effort, thinks in (("none", False), ("minimal", False), ("high", True)):
        await thinker.post(URL, B | {"reasoning": {"effort": effort}})
        prompt = thinker.tokenizer.decode(thinker.engine.seen[-1].prompt_ids)
        assert ("</think>" in prompt) is not thinks, effort
