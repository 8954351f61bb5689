"""Responses with OpenAI's own client, against a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from service.messages import FinishReason

pytestmark = pytest.mark.slow

OPTIONS: Any = {
    "model": "tiny-model", "input": "hello", "max_output_tokens": 12,
    "extra_body": {"seed": 5}, "metadata": {"a": "b"}, "instructions": "be kind",
}  # fmt: skip


async def test_responses(service: Any, listen: Any) -> None:
    async with (
        listen(service.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        responses = client.responses
        logprobs: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        whole = await responses.create(**OPTIONS, **logprobs)
        assert whole.output_text == service.tokenizer.decode(
            service.engine.script(service.engine.seen[0])
        )
        assert whole.incomplete_details is not None
        assert (whole.status, whole.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
        assert whole.usage is not None
        assert whole.usage.output_tokens == 12
        assert (whole.metadata, whole.instructions) == ({"a": "b"}, "be kind")
        content: Any = whole.output[0]
        assert len(content.content[0].logprobs) == 12
        assert len(content.content[0].logprobs[0].top_logprobs) == 2
        assert await responses.retrieve(whole.id) == whole

        events = [event async for event in await responses.create(**OPTIONS, stream=True)]
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert "".join(event.delta for event in deltas) == whole.output_text
        last: Any = events[-1]
        assert (last.type, last.response.output_text) == ("response.incomplete", whole.output_text)

        service.engine.pause = 0.002
        begun = await responses.create(**OPTIONS, background=True)
        assert begun.status == "queued"
        rest = [
            event
            async for event in await responses.retrieve(begun.id, stream=True, starting_after=3)
        ]
        numbers = [event.sequence_number for event in deltas]
        assert [event.sequence_number for event in rest] == [*numbers, 16, 17, 18, 19]
        done = await responses.retrieve(begun.id)
        assert done.output_text == whole.output_text

        service.engine.pause = 0.05
        begun = await responses.create(**OPTIONS, background=True)
        cancelled = await responses.cancel(begun.id)
        assert cancelled.status == "cancelled"
        stream = await responses.retrieve(begun.id, stream=True)
        assert [str(event.type) async for event in stream][-1] == "response.cancelled"
        await responses.delete(begun.id)
        with pytest.raises(openai.NotFoundError) as gone:
            await responses.retrieve(begun.id)
        assert gone.value.code == "response_not_found"


async def test_the_stream_manager(service: Any, listen: Any) -> None:
    """`responses.stream` accumulates a snapshot and checks the order of the events."""
    async with (
        listen(service.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        service.engine.end = FinishReason.STOP
        async with client.responses.stream(**OPTIONS) as stream:
            async for _ in stream:
                pass
            final: Any = await stream.get_final_response()
        assert final.output_text == service.tokenizer.decode(
            service.engine.script(service.engine.seen[0])
        )


async def test_a_conversation_that_the_server_keeps(service: Any, listen: Any) -> None:
    async with (
        listen(service.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        responses = client.responses
        first = await responses.create(**OPTIONS)
        said: Any = [{"role": "user", "content": text} for text in ("and", "then?")]
        options = OPTIONS | {"input": said, "instructions": None}
        second = await responses.create(**options, previous_response_id=first.id)
        assert second.previous_response_id == first.id
        whole: Any = [{"role": "user", "content": "hello"}, *first.output, *said]
        await responses.create(**OPTIONS | {"input": whole, "instructions": None})
        assert service.engine.seen[-2].prompt_ids == service.engine.seen[-1].prompt_ids
        for limit in (1, 100):  # pages are followed
            listed = responses.input_items.list(second.id, order="asc", limit=limit)
            items: list[Any] = [item async for item in listed]
            assert [item.content[0].text for item in items] == ["and", "then?"]
        reference: Any = [{"type": "item_reference", "id": items[0].id}, *said]
        assert (await responses.create(**options | {"input": reference})).id
        await responses.delete(first.id)
        with pytest.raises(openai.NotFoundError) as gone:
            await responses.create(**options, previous_response_id=second.id)
        assert gone.value.code == "previous_response_not_found"


async def test_errors_become_exceptions_of_the_client(service: Any, listen: Any) -> None:
    async with (
        listen(service.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        unknown: Any = [{"type": "web_surf"}]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(**OPTIONS, tools=unknown)
        assert (refused.value.param, refused.value.code) == ("tools[0].type", "invalid_value")
        service.engine.bad_digest_at = 2
        with pytest.raises(openai.APIError) as diverged:
            async for _ in await client.responses.create(**OPTIONS, stream=True):
                pass
        assert diverged.value.code == "stream_divergence"


async def test_the_synchronous_client(service: Any, listen: Any) -> None:
    def talk(url: str) -> tuple[str, str, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            whole = client.responses.create(**OPTIONS)
            stream: Any = client.responses.create(**OPTIONS, stream=True)
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            again: Any = client.responses.retrieve(whole.id, stream=True)
            third = "".join(e.delta for e in again if e.type == "response.output_text.delta")
            client.responses.delete(whole.id)
            return whole.output_text, text, third

    async with listen(service.app) as url:
        assert len(set(await asyncio.to_thread(talk, url))) == 1
