"""OpenAI's own Python client against a real server: what it reads is what the engine said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
async def client(service: Any, listen: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        listen(service.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


MESSAGES: Any = [{"role": "user", "content": "hello"}]


async def test_chat(service: Any, client: openai.AsyncOpenAI) -> None:
    options: Any = {
        "model": "tiny-model", "messages": MESSAGES, "max_completion_tokens": 12, "seed": 5,
        "logprobs": True, "top_logprobs": 2, "n": 2,
    }  # fmt: skip
    whole = await client.chat.completions.create(**options)
    texts = [choice.message.content for choice in whole.choices]
    requests = sorted(service.engine.seen, key=lambda request: request.id)
    assert texts == [service.tokenizer.decode(service.engine.script(r)) for r in requests]
    content = whole.choices[0].logprobs and whole.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 12
    assert len(content[0].top_logprobs) == 2
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.system_fingerprint == "class-1"

    streamed = ["", ""]
    usage = None
    stream = await client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert usage == whole.usage


@pytest.mark.parametrize("event_ids", [{}, {"X-Quire-Event-Ids": "1"}])
async def test_completions(
    service: Any, client: openai.AsyncOpenAI, event_ids: dict[str, str]
) -> None:
    options: Any = {
        "model": "tiny-model", "prompt": ["hello", "€"], "max_tokens": 12, "seed": 5,
        "logprobs": 2, "echo": True, "extra_headers": event_ids,
    }  # fmt: skip
    whole = await client.completions.create(**options)
    streamed = ["", ""]
    async for chunk in await client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in whole.choices]
    assert streamed[1].startswith("€")
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.text_offset is not None


async def test_the_comment_that_keeps_alive_is_understood(
    start_service: Any, small_limits: Any, listen: Any
) -> None:
    async with (
        start_service(limits=small_limits(keep_alive=0.02)) as service,
        listen(service.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        service.engine.pause = 0.05
        stream = await client.chat.completions.create(
            model="tiny-model", messages=MESSAGES, max_tokens=4, stream=True
        )
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "length"


async def test_errors_are_its_exceptions(service: Any, client: openai.AsyncOpenAI) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        await create(model="nope", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id is not None
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model="tiny-model", messages=MESSAGES, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        await create(model="tiny-model", messages=MESSAGES, functions=[{"name": "f"}])
    assert refused.value.code == "unsupported_parameter"
    service.state["draining"] = True
    with pytest.raises(openai.InternalServerError) as away:
        await create(model="tiny-model", messages=MESSAGES)
    assert away.value.code == "shutting_down"
    service.state["draining"] = False
    service.engine.bad_digest_at = 2
    with pytest.raises(openai.APIError) as diverged:
        async for _ in await create(model="tiny-model", messages=MESSAGES, stream=True):
            pass
    assert diverged.value.code == "stream_divergence"


async def test_the_synchronous_client(service: Any, listen: Any) -> None:
    def talk(url: str) -> tuple[str, str, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            options: Any = {"model": "tiny-model", "messages": MESSAGES, "seed": 1}
            whole = client.chat.completions.create(**options, max_tokens=9)
            stream = client.chat.completions.create(**options, max_tokens=9, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return str(whole.choices[0].message.content), text, client.models.list().data[0].id

    async with listen(service.app) as url:
        whole, streamed, model = await asyncio.to_thread(talk, url)
    assert whole == streamed
    assert model == "tiny-model"
