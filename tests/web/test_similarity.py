"""The form that compares two texts, with a real encoder: its similarity and its attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.async_api import Route, expect

from model.checkpoint.fetch import default_cache, resolve
from tests.conftest import serving
from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

MODEL = "all-minilm-l6-v2"
PAIR = {"text_1": "A cat sleeps.", "text_2": "<b>kittens</b> nap"}


@pytest.fixture(scope="module")
def encoder_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with an encoder alone."""
    options = ("--model", f"{MODEL}={resolve(MODEL, cache=default_cache())}", "--threads", "1")
    with serving(*options, log=tmp_path_factory.mktemp("encoder") / "log") as url:
        yield url


async def reply(url: str, path: str, **body: Any) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
        answer = await client.post(path, json={"model": MODEL, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_two_texts_are_compared_and_their_attention_is_shown(
    visit: Any, encoder_url: str, findings: Any, overflow: Any
) -> None:
    tab = await visit(encoder_url, reduced_motion="reduce")
    form = tab.page.locator("#similarity")
    await expect(tab.page.locator("#similarity-model")).to_have_value(MODEL)
    await expect(tab.page.locator("#models")).to_be_hidden()
    await tab.page.fill("#text-1", PAIR["text_1"])
    await tab.page.fill("#text-2", PAIR["text_2"])
    await tab.page.press("#text-2", "Tab")
    await tab.page.keyboard.press("Tab")
    await tab.page.keyboard.press("Enter")
    score = (await reply(encoder_url, "/v1/score", **PAIR))["data"][0]["score"]
    await expect(tab.page.locator("#similarity-score")).to_have_text(f"{score:.3f}")
    look = form.get_by_role("button", name="Attention")
    await look.focus()
    await tab.page.keyboard.press("Enter")
    await expect(look).to_have_attribute("aria-expanded", "true")
    maps = form.locator(".attention")
    await expect(maps).to_have_count(2)
    for text, shown in zip(PAIR.values(), await maps.all(), strict=True):
        tokens = shown.locator(".heat > *")
        expected = await reply(encoder_url, "/v1/attention", prompt=text, return_token_strs=True)
        await expect(tokens).to_have_text(expected["token_strs"])
        await shown.locator(".heat").focus()
        await tab.page.keyboard.press("Home")
        await tab.page.keyboard.press("ArrowRight")
        await expect(tokens.nth(1)).to_have_attribute("aria-selected", "true")
        weights = expected["rows"][1]["weights"]
        assert len(weights) == len(expected["tokens"]), "an encoder attends to later tokens, too"
        titles = [await token.get_attribute("title") for token in await tokens.all()]
        assert [float(title.split()[0]) for title in titles if title] == pytest.approx(
            [100 * weight for weight in weights], abs=0.06
        )
        await expect(shown.locator(".attended")).to_contain_text(" after")
    assert await findings(tab.page) == []
    assert await overflow(tab.page) == []
    await look.click()
    await expect(maps).to_have_count(0)


async def test_the_chosen_encoder_is_asked_and_remembered(visit: Any, encoder_url: str) -> None:
    """The status of a server that has one that scores pairs, too, and one without an engine."""
    tab = await visit(encoder_url)
    asked: list[Any] = []

    async def add_models(route: Route) -> None:
        response = await route.fetch()
        status = await response.json()
        (model,) = status["models"]
        status["models"] += [
            model | {"id": "pairs", "kind": "score"}, model | {"id": "away", "served": False}
        ]  # fmt: skip
        await route.fulfill(response=response, json=status)

    async def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        await route.fulfill(json={"data": [{"score": 0.61234}]})

    await tab.page.route("**/status", add_models)
    await tab.page.route("**/v1/score", answer)
    choice = tab.page.locator("#similarity-model")
    await expect(choice.locator("option")).to_have_text([MODEL, "pairs"])
    await choice.select_option("pairs")
    await expect(tab.page.locator("#similarity-look")).to_be_hidden()
    await tab.page.reload()
    await expect(choice).to_have_value("pairs")
    await tab.page.fill("#text-1", "a cat")
    await tab.page.fill("#text-2", "a kitten")
    await tab.page.get_by_role("button", name="Compare").click()
    await expect(tab.page.locator("#similarity-score")).to_have_text("0.612")
    assert asked == [{"model": "pairs", "text_1": "a cat", "text_2": "a kitten"}]
