"""The form that compares two texts: shown if a model of the server does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.async_api import Route, expect

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]


async def test_two_texts_are_compared_by_the_model_that_embeds(visit: Any) -> None:
    """The status of a server that has an encoder, too; its scores are made up here."""
    tab = await visit()
    page = tab.page
    form, score = page.locator("#similarity"), page.locator("#similarity-score")
    await expect(page.locator("#model")).not_to_be_empty()
    await expect(form).to_be_hidden()
    asked: list[dict[str, Any]] = []

    async def add_encoder(route: Route) -> None:
        response = await route.fetch()
        status = await response.json()
        status["models"].append(status["models"][0] | {"id": "encoder", "kind": "embed"})
        await route.fulfill(response=response, json=status)

    async def answer(route: Route) -> None:
        asked.append(json.loads(route.request.post_data or "{}"))
        await route.fulfill(json={"data": [{"score": 0.61234}]})

    await page.route("**/status", add_encoder)
    await page.route("**/v1/score", answer)
    await expect(form).to_be_visible()
    await expect(page.locator("#models")).to_be_hidden()
    await page.locator("#text-1").fill("a cat")
    await page.locator("#text-2").fill("a kitten")
    await form.get_by_role("button", name="Compare").click()
    await expect(score).to_have_text("0.612")
    assert asked == [{"model": "encoder", "text_1": "a cat", "text_2": "a kitten"}]
