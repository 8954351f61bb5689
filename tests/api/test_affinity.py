"""Which calls name the prefixes of their prompts, so that an engine that holds them is found."""

from __future__ import annotations

import pytest

from service.api.generation.plan import MAX_FOUND_PROMPTS, named_prefixes
from service.cluster import Cluster
from service.messages import GenerationRequest, ModelCard, SamplingParams
from service.observability.metrics import Metrics
from service.prefixes import prompt_prefixes
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.queues.builders import make_engine

CARD = ModelCard(id="m", max_model_len=64, vocab_size=9, numeric_class="c", created=0, block_size=4)


def make_requests(count: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            id="r", prompt_ids=(number, *range(40)), sampling=SamplingParams(seed=0), max_tokens=1
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("width", [1, 3])
def test_each_choice_names_the_prefixes_of_its_prompt(width: int) -> None:
    requests = make_requests(2)
    expected = [
        prompt_prefixes(request.prompt_ids, tenant="public", numeric_class="c", block_size=4)
        for request in requests
    ]
    assert len(expected[0]) >= 8
    assert not set(expected[0]) & set(expected[1])
    assert named_prefixes(requests, width, CARD) == tuple(
        names for names in expected for _ in range(width)
    )
    assert named_prefixes(make_requests(MAX_FOUND_PROMPTS + 1), width, CARD) == ()


async def test_one_engine_alone_is_not_looked_for() -> None:
    """Its block size is known, but it takes everything anyway: nothing is hashed."""
    queue, card = (
        MemoryQueue(QueueLimits()),
        ModelCard(id="m", max_model_len=64, vocab_size=9, numeric_class="c", created=0),
    )
    cluster = Cluster(queue, [card], observer=Metrics())
    sizes = []
    for name in ("a", "b"):
        await queue.claim(make_engine(name, block_size=4), limit=0, wait=0)
        await cluster.refresh()
        sizes.append(cluster.models["m"].card.block_size)
    assert sizes == [0, 4]
    assert named_prefixes(make_requests(1), 1, card) == ()
