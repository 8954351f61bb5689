"""POST /v1/messages with a model that thinks, as its chat template shows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from model.text.tokenizer import Tokenizer
from service.api.structured.validator import GrammarValidator
from service.messages import FinishReason
from service.startup import load_tokenizer
from tests.api.conftest import validator_of
from tests.api.test_anthropic_thinking import assembled

ASK: dict[str, Any] = {
    "model": "tiny-model",
    "max_tokens": 300,
    "seed": 3,
    "messages": [{"role": "user", "content": "hello"}],
}
# As Qwen 3: the model opens its thinking itself, unless it is switched off.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny model's, with this template."""
    folder = tiny_model.write_folder(tmp_path_factory.mktemp("thinker") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def grammar_validator(tokenizer: Tokenizer) -> Iterator[GrammarValidator]:
    """One of this vocabulary."""
    with validator_of(tokenizer) as validator:
        yield validator


@pytest.fixture
async def service(start_service: Any) -> AsyncIterator[Any]:
    async with start_service(max_model_len=4096) as started:
        ids = started.tokenizer.encode("<think>\nSo: 2 + 2.\n</think>\n\nIt is 4.")
        started.engine.script = lambda _request: ids
        started.engine.end = FinishReason.STOP
        yield started


async def sent(service: Any, **fields: Any) -> Any:
    reply = await service.post("/v1/messages", ASK | fields)
    assert reply.status_code == 200, reply.text
    return reply


def kinds(body: dict[str, Any]) -> list[str]:
    return [block["type"] for block in body["content"]]


@pytest.mark.parametrize(
    "thinking",
    [None, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}],
    ids=["default", "adaptive", "enabled"],
)
async def test_reasoning_is_a_thinking_block(service: Any, thinking: Any) -> None:
    body = (await sent(service, thinking=thinking)).json()
    assert kinds(body) == ["thinking", "text"]
    assert [body["content"][0]["thinking"], body["content"][1]["text"]] == [
        "So: 2 + 2.",
        "It is 4.",
    ]
    assert body["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    streamed = assembled((await sent(service, thinking=thinking, stream=True)).content)
    assert streamed | {"id": ""} == body | {"id": ""}
    assert service.engine.seen[-1].prompt_ids == service.engine.seen[0].prompt_ids


@pytest.mark.parametrize("stream", [False, True])
async def test_omitted_reasoning_is_not_in_the_answer(service: Any, stream: bool) -> None:
    asked = {"type": "adaptive", "display": "omitted"}
    reply = await sent(service, thinking=asked, stream=stream)
    body = assembled(reply.content) if stream else reply.json()
    assert kinds(body) == ["text"]
    assert body["content"][0]["text"] == "It is 4."
    assert body["usage"]["output_tokens_details"]["thinking_tokens"] > 0


async def test_disabled_thinking_is_switched_off_by_the_template(service: Any) -> None:
    ids = service.tokenizer.encode("It is 4.")
    service.engine.script = lambda _request: ids
    body = (await sent(service, thinking={"type": "disabled"})).json()
    assert kinds(body) == ["text"]
    prompt = service.tokenizer.decode(service.engine.seen[-1].prompt_ids)
    assert prompt.endswith("<think>\n\n</think>\n\n")


async def test_a_budget_reaches_the_engine(service: Any) -> None:
    await sent(service, thinking={"type": "enabled", "budget_tokens": 7})
    assert service.engine.seen[-1].thinking.budget == 7


async def test_thinking_of_the_history_reaches_the_template(service: Any) -> None:
    body = (await sent(service)).json()
    turns = [*ASK["messages"], {"role": "assistant", "content": body["content"]}, *ASK["messages"]]
    await sent(service, messages=turns)
    prompt = service.tokenizer.decode(service.engine.seen[-1].prompt_ids)
    assert "<think>So: 2 + 2.</think>It is 4." in prompt
