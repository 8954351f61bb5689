"""Bodies of current clients and agents are answered, or refused by the name of a field."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.agent_bodies import BODIES, Body

MOST_REFUSED = 6
DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.fixture
async def service(start_service: Any) -> AsyncIterator[Any]:
    """A replica with room for tools in a prompt."""
    async with start_service(max_model_len=4096) as started:
        yield started


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.client)
async def test_an_agent_is_answered(service: Any, body: Body) -> None:
    reply = await service.post(body.path, {"model": "tiny-model"} | body.fields)
    if body.refused is None:
        assert reply.status_code == 200, reply.text
        assert b'"error":{' not in reply.content
    else:
        assert reply.status_code == 400
        assert body.refused in reply.text


def test_few_are_refused_and_each_for_a_reason_that_is_documented() -> None:
    assert len(BODIES) >= 51
    assert len({body.client for body in BODIES}) == len(BODIES)
    refused = [body.refused for body in BODIES if body.refused is not None]
    assert len(refused) <= MOST_REFUSED
    reasons = DOCUMENT.read_text(encoding="utf-8").partition("## What is refused")[2]
    for name in refused:
        assert f"`{name.partition('.')[2] or name}`" in reasons
