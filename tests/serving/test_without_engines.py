"""What an API replica does with calls while no engine is available."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from model.text.tokenizer import Tokenizer
from service.cluster import ENGINES_GONE_AFTER, Cluster
from service.messages import ModelCard, model_feature
from service.observability.metrics import Metrics
from service.parts import ApiModel, ApiSide, make_metrics
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from service.settings import Settings
from tests.queues.builders import claim_one, finish, make_engine
from tests.support.waiting import PATIENCE

CARD = ModelCard(id="tiny", max_model_len=64, vocab_size=512, numeric_class="guess", created=0)
BODY = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, "stream": True}


@dataclass
class Replica:
    client: httpx.AsyncClient
    queue: MemoryQueue
    metrics: Metrics
    side: ApiSide

    @property
    def unserved(self) -> float:
        return float(self.metrics.unserved.labels("tiny")._value.get())


Start = Callable[..., Any]


@pytest.fixture
def replica(tiny_tokenizer: Tokenizer) -> Start:
    """`async with replica(**settings)`: one whose engines are gone for longer than it waits."""

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[Replica]:
        queue, configured = MemoryQueue(QueueLimits(max_requests=2)), Settings(**settings)
        metrics = make_metrics(configured, "api")
        side = ApiSide(configured, [ApiModel(card=CARD, tokenizer=tiny_tokenizer)], queue, metrics)
        await side.cluster.refresh()
        engines = side.cluster.models[CARD.id]
        assert engines._gone_since is not None
        engines._gone_since -= ENGINES_GONE_AFTER
        transport = httpx.ASGITransport(app=side.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield Replica(client, queue, metrics, side)

    return start


async def test_without_the_setting_they_are_refused_and_counted(replica: Start) -> None:
    async with replica() as one:
        for count in (1, 2):
            reply = await one.client.post("/v1/completions", json=BODY)
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "backend_unavailable"
            assert int(reply.headers["retry-after"]) >= 1
            assert one.unserved == count
        assert (await one.queue.depth()).queued_requests == 0
        assert (await one.client.get("/health/ready")).status_code == 200
        await one.queue.claim(make_engine(), limit=0, wait=0)
        await one.side.cluster.refresh()
        call = asyncio.create_task(one.client.post("/v1/completions", json=BODY))
        await finish(one.queue, await claim_one(one.queue, wait=5), length=4)
        assert (await call).status_code == 200
        assert one.unserved == 2


async def test_only_what_was_seen_counts_as_gone() -> None:
    """A replica that was held up for a minute has not seen that the engines were away."""
    now = 0.0
    queue = MemoryQueue(QueueLimits(), clock=lambda: now)
    cluster = Cluster(queue, [CARD], observer=Metrics(role="api"), clock=lambda: now)
    found = []
    for heard, passes in ((False, 60), (True, 60), (False, 0), (False, ENGINES_GONE_AFTER)):
        if heard:
            await queue.claim(make_engine(), limit=0, wait=0)
            await cluster.refresh()
        now += passes
        found.append(cluster.models["tiny"].available)
        if not heard and now > 100:
            await cluster.refresh()
    assert found == [True, True, True, False], "not looked, not looked again, just seen, gone"
    await queue.claim(make_engine(), limit=0, wait=0)
    await cluster.refresh()
    assert cluster.models["tiny"].available


async def test_engines_of_another_model_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    """They would leave its requests where they are."""
    now = 0.0
    queue = MemoryQueue(QueueLimits(), clock=lambda: now)
    card, other = (replace(CARD, id=name, vocabulary="v") for name in ("tiny", "large"))
    cluster = Cluster(queue, [card], observer=Metrics(role="api"), clock=lambda: now)
    tiny = cluster.models["tiny"]
    await queue.claim(make_engine("other", features=(model_feature(other.key),)), limit=0, wait=0)
    await cluster.refresh()
    now += ENGINES_GONE_AFTER
    seen = [(tiny.available, tiny.card.numeric_class)]
    assert "none of the queue's 1 engines serves tiny" in caplog.text
    own = make_engine("own", numeric_class="own", features=(model_feature(card.key),))
    await queue.claim(own, limit=0, wait=0)
    await cluster.refresh()
    seen.append((tiny.available, tiny.card.numeric_class))
    assert seen == [(False, "guess"), (True, "own")]


async def test_with_the_setting_they_wait_within_the_queues_limits(replica: Start) -> None:
    async with replica(accept_without_engines=True) as one:
        calls = [asyncio.create_task(one.client.post("/v1/completions", json=BODY)) for _ in "ab"]
        async with asyncio.timeout(PATIENCE):
            while (await one.queue.depth()).queued_requests < 2:
                await asyncio.sleep(0.001)
        third = await one.client.post("/v1/completions", json=BODY)
        assert (third.status_code, third.json()["error"]["message"]) == (503, "the queue is full")
        assert (await one.client.get("/health/ready")).status_code == 200
        assert not any(call.done() for call in calls)
        for _ in calls:
            await finish(one.queue, await claim_one(one.queue), length=4)
        for reply in await asyncio.gather(*calls):
            assert reply.text.endswith("data: [DONE]\n\n")
        assert one.unserved == 0


@pytest.mark.parametrize(("settings", "value"), [({}, 0), ({"accept_without_engines": True}, 1)])
async def test_the_alert_for_missing_engines_knows_the_setting(
    replica: Start, settings: dict[str, Any], value: int
) -> None:
    async with replica(**settings) as one:
        assert f"quire_accepts_without_engines {value}.0" in one.metrics.render().decode()
