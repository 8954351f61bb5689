"""Fields of chat completions that change how an answer is scheduled, padded or returned."""

from __future__ import annotations

import random
from typing import Any

import pytest

from service.api.generation.plan import DEFAULT_PRIORITY, LOWEST_PRIORITY
from service.api.http.auth import Tenant
from service.api.openai.answer import OBFUSCATION_BLOCK

CHAT = "/v1/chat/completions"
C = {"model": "tiny-model", "messages": [{"role": "user", "content": "hello"}], "seed": 3}
NO_EFFECT = {
    "store": True, "verbosity": "high", "modalities": ["text"], "user": "u", "metadata": {"a": "b"},
    "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"}, "web_search_options": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NO_EFFECT)
async def test_a_field_without_effect_changes_no_answer(service: Any, name: str) -> None:
    answers = [
        (await service.post(CHAT, C | {"max_tokens": 6} | more)).json()["choices"]
        for more in ({}, {name: NO_EFFECT[name]})
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("highest", [0, 1, 2])
@pytest.mark.parametrize(
    ("given", "used"),
    [
        (None, None), ("auto", "default"), ("default", "default"), ("scale", "default"),
        ("flex", "flex"), ("priority", "priority"), ("fast", "priority"),
    ],
)  # fmt: skip
async def test_a_tier_is_a_priority_that_the_key_allows(
    start_service: Any, read_events: Any, given: str | None, used: str | None, highest: int
) -> None:
    tenant = Tenant(name="t", highest_priority=highest)
    async with start_service(authenticate=lambda _: tenant) as service:
        body = C | {"max_tokens": 4, "service_tier": given}
        whole = (await service.post(CHAT, body)).json()
        assert whole.get("service_tier") == used
        reply = await service.post(CHAT, body | {"stream": True})
        assert {event.get("service_tier") for event in read_events(reply.content)} == {used}
        default = max(DEFAULT_PRIORITY, highest)
        expected = {"flex": LOWEST_PRIORITY, "priority": highest}.get(used or "", default)
        assert [request.priority for request in service.engine.seen] == [expected] * 2
        # The field of its own decides, if both are given.
        await service.post(CHAT, body | {"priority": 2})
        assert service.engine.seen[-1].priority == 2


@pytest.mark.parametrize("seed", range(5))
async def test_padded_chunks_have_few_sizes_and_the_same_text(
    service: Any, read_events: Any, seed: int
) -> None:
    draw = random.Random(seed)
    body = C | {"max_tokens": 20, "seed": seed, "stream": True, "logprobs": draw.random() < 0.5}
    texts, sizes = [], []
    for padded in (False, True):
        options = {"include_obfuscation": padded, "include_usage": draw.random() < 0.5}
        reply = await service.post(CHAT, body | {"stream_options": options}, x_quire_event_ids="1")
        events = read_events(reply.content)
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
        texts.append("".join(delta.get("content") or "" for delta in deltas))
        assert all(("obfuscation" in event) == padded for event in events if event["choices"])
        chunks = [line for line in reply.content.split(b"\n") if b'"choices":[{' in line]
        sizes = [len(line.split(b',"usage"')[0].rstrip(b"}")) for line in chunks]
    assert texts[0] == texts[1]
    field = len(b',"obfuscation":""')
    assert {(size - field) % OBFUSCATION_BLOCK for size in sizes} == {0}


async def test_a_limit_below_one_names_the_default(service: Any) -> None:
    """Clients of other servers send -1 for "no limit"."""
    for name in ("max_tokens", "max_completion_tokens"):
        error = (await service.post(CHAT, C | {name: -1})).json()["error"]
        assert error["message"] == (
            f"{name} must be at least 1; leave it out for the default, there is no -1"
        )


@pytest.mark.parametrize("content", ["hello world", [{"type": "text", "text": "hello world"}]])
async def test_a_prediction_reaches_the_engine_and_changes_no_answer(
    start_service: Any, small_limits: Any, content: Any
) -> None:
    body = C | {"max_tokens": 6}
    prediction = {"prediction": {"type": "content", "content": content}}
    for most in (16_384, 3):
        async with start_service(limits=small_limits(max_prediction_tokens=most)) as service:
            plain = (await service.post(CHAT, body)).json()["choices"]
            assert (await service.post(CHAT, body | prediction)).json()["choices"] == plain
            ids = service.tokenizer.encode("hello world", add_bos=False)
            seen = [list(request.prediction) for request in service.engine.seen]
            assert seen == [[], ids[:most]]
            assert "prediction" not in service.engine.seen[1].features
