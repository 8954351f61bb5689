"""The choice of the model: shown if there are several, used in requests, remembered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.async_api import Route, expect

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]


async def test_the_chosen_model_is_asked_and_remembered(visit: Any) -> None:
    """The status of a server that has two more models, one of them without an engine."""
    tab = await visit()
    page = tab.page
    await expect(page.locator("#models")).to_be_hidden()
    first = await page.locator("#model").text_content()
    asked: list[str] = []

    async def add_models(route: Route) -> None:
        response = await route.fetch()
        status = await response.json()
        (model,) = status["models"]
        status["models"] += [model | {"id": "other"}, model | {"id": "away", "served": False}]
        await route.fulfill(response=response, json=status)

    async def keep_model(route: Route) -> None:
        body: dict[str, Any] = json.loads(route.request.post_data or "{}")
        asked.append(body["model"])
        await route.continue_(post_data=body | {"model": first})

    await page.route("**/status", add_models)
    await page.route("**/v1/chat/completions", keep_model)
    choice = page.locator("#models")
    await expect(choice).to_be_visible()
    await expect(page.locator("#model")).to_be_hidden()
    await expect(choice).to_have_value(first)
    await expect(choice.locator("option[value=away]")).to_be_disabled()
    await choice.select_option("other")
    await page.reload()
    await expect(choice).to_have_value("other")
    await tab.set(max_tokens=4)
    await tab.ask("Name a colour.")
    await tab.ended()
    assert asked == ["other"]
