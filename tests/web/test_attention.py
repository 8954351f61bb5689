"""The attention heat map: it shows the API's weights, and is accessible."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from playwright.async_api import Page, Route, expect

from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

QUESTION = "Anna has a red bicycle and Tom has a blue car. What does Tom have?"
PHONE = {"width": 360, "height": 740}


async def opened(tab: Any, *, tokens: int = 24) -> None:
    """Asks, waits for the end, and opens the answer's heat map."""
    if not await tab.page.locator("#seed").is_visible():  # a narrow window: behind a switch
        await tab.page.click("#panel-switch")
        await tab.set(seed=5, max_tokens=tokens)
        await tab.page.click("#panel-switch")
    else:
        await tab.set(seed=5, max_tokens=tokens)
    await tab.ask(QUESTION)
    await tab.ended()
    await tab.page.get_by_role("button", name="Attention").click()
    await expect(tab.page.locator(".heat")).to_be_visible()


async def read(page: Page) -> None:
    """Waits until the last requested map is drawn."""
    await expect(page.locator(".attention")).to_have_attribute("aria-busy", "false")


async def asked(url: str, record: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The map as an API client gets it."""
    tokens = [*record["prompt"], *(token["id"] for token in record["tokens"])]
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        while (
            reply := await client.post("/v1/attention", json={"tokens": tokens, **fields})
        ).status_code == 503:  # it is busy
            await asyncio.sleep(0.1)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def listed(page: Page) -> list[float]:
    """The weights in the list next to the map, in percent."""
    shown = await page.locator(".attended li > :last-child").all_inner_texts()
    return [float(re.sub(r"[^0-9.]", "", text)) for text in shown]


def heaviest(row: dict[str, Any]) -> list[float]:
    return sorted((100 * weight for weight in row["weights"]), reverse=True)[:5]


async def test_the_map_shows_what_the_network_attends_to(visit: Any, server_url: str) -> None:
    """By pointer: each chosen token's weights, for the mean, for a layer and for one head."""
    tab = await visit()
    await opened(tab)
    record = await tab.record()
    options = tab.page.get_by_role("option").and_(tab.page.locator(".heat > *"))
    everything = await asked(server_url, record, return_token_strs=True)
    assert await options.count() == len(everything["tokens"])
    shown = [text.replace("⏎\n", "\n") for text in await options.all_text_contents()]
    assert shown == everything["token_strs"]
    last = len(record["prompt"]) + len(record["tokens"]) - 1
    for fields, menus in (
        ({}, {}),
        ({"layer": 7, "head": 2}, {"Layer": "7", "Head": "2"}),
    ):
        for label, value in menus.items():
            await tab.page.get_by_label(label).select_option(label=value)
        await read(tab.page)
        rows = (await asked(server_url, record, **fields))["rows"]
        for position in (last - 2, 3):
            await options.nth(position).click()
            assert await listed(tab.page) == pytest.approx(heaviest(rows[position]), abs=0.06)
        heat = await tab.page.evaluate(
            "[...document.querySelectorAll('.heat > *')]"
            ".map((token) => Number(token.style.getPropertyValue('--heat')))"
        )
        assert heat[4:] == [0] * (len(heat) - 4), "nothing attends to what comes later"
        assert heat[0] > 0


async def test_the_answers_tokens_are_those_that_were_sampled(
    visit: Any, server_url: str, undisturbed: Any
) -> None:
    tab = await visit()
    await tab.set(seed=5, max_tokens=40)
    await tab.ask(QUESTION)
    await tab.ended()
    record = await tab.record()
    alone = await undisturbed(
        server_url, QUESTION, seed=5, max_tokens=40, return_token_ids=True, logprobs=True
    )
    assert [token["id"] for token in record["tokens"]] == alone["token_ids"]
    async with httpx.AsyncClient(base_url=server_url, timeout=PATIENCE) as client:
        reply = await client.post(
            "/tokenize", json={"messages": [{"role": "user", "content": QUESTION}]}
        )
    assert record["prompt"] == reply.json()["tokens"]


async def test_the_map_works_from_the_keyboard_and_is_announced(visit: Any) -> None:
    tab = await visit()
    await opened(tab)
    button = tab.page.get_by_role("button", name="Attention")
    await expect(button).to_have_attribute("aria-expanded", "true")
    await button.focus()
    heat = tab.page.locator(".heat")
    for _ in range(6):
        await tab.page.keyboard.press("Tab")
        if await heat.evaluate("(heat) => heat === document.activeElement"):
            break
    await expect(heat).to_be_focused()
    chosen = tab.page.locator('.heat [aria-selected="true"]')
    said = tab.page.locator(".attended")
    await expect(said).to_have_attribute("aria-live", "polite")
    for key, index in (("Home", 0), ("ArrowRight", 1), ("ArrowDown", 2), ("ArrowLeft", 1)):
        await tab.page.keyboard.press(key)
        await expect(chosen).to_have_count(1)
        identity = await chosen.get_attribute("id") or ""
        assert identity.endswith(f"-{index}")
        assert await heat.get_attribute("aria-activedescendant") == identity
        text = (await chosen.text_content() or "").replace("⏎\n", "⏎").replace(" ", "␣")
        await expect(said.locator("p")).to_have_text(f"{text} attends to")
    await expect(said.locator("li").first).to_contain_text("%")
    await tab.page.keyboard.press("End")
    await expect(tab.page.locator(".heat > :last-child")).to_have_attribute("aria-selected", "true")
    await button.focus()
    await tab.page.keyboard.press("Enter")
    await expect(button).to_have_attribute("aria-expanded", "false")
    await expect(heat).to_have_count(0)


@pytest.mark.parametrize(("colours", "phone"), [("dark", False), ("light", True)])
async def test_the_map_is_accessible(
    visit: Any, colours: str, phone: bool, findings: Any, overflow: Any
) -> None:
    options = {"viewport": PHONE, "has_touch": True, "is_mobile": True} if phone else {}
    tab = await visit(color_scheme=colours, reduced_motion="reduce", **options)
    await opened(tab)
    token = tab.page.locator(".heat > *").nth(20)
    await (token.tap() if phone else token.click())
    await expect(token).to_have_attribute("aria-selected", "true")
    assert await overflow(tab.page) == []
    assert await findings(tab.page) == []


async def test_errors_are_shown(visit: Any) -> None:
    """A text over the limit, without a request; and a server that is busy for a while."""
    tab = await visit()
    await tab.set(seed=5, max_tokens=8)
    await tab.ask("word " * 600)
    await tab.ended()
    await tab.page.get_by_role("button", name="Attention").click()
    await expect(tab.page.locator(".heat-note")).to_contain_text("up to 512 tokens")
    await tab.page.get_by_role("button", name="New chat").click()

    calls: list[Any] = []

    async def busy_once(route: Route) -> None:
        calls.append(json.loads(route.request.post_data or ""))
        if len(calls) > 1:
            await route.continue_()
            return
        error = {"error": {"message": "attention is being read for another call"}}
        await route.fulfill(status=503, json=error, headers={"retry-after": "1"})

    await tab.page.route("**/v1/attention", busy_once)
    tab.network_may_fail = True  # the browser notes the 503
    await opened(tab, tokens=8)
    assert len(calls) == 2
    assert calls[0] == calls[1]
    tab.errors = [error for error in tab.errors if "503 (Service Unavailable)" not in error]


async def test_without_a_network_there_is_no_button(visit: Any, server_url: str) -> None:
    """As on an API replica."""
    tab = await visit()

    async def without(route: Route) -> None:
        reply = await route.fetch()
        status = await reply.json()
        for model in status["models"]:
            model["max_attention_tokens"] = None
        await route.fulfill(json=status)

    await tab.page.route("**/status", without)
    await tab.page.reload()
    await tab.set(seed=5, max_tokens=4)
    await tab.ask(QUESTION)
    await tab.ended()
    await expect(tab.page.get_by_role("button", name="Tokens", exact=True)).to_be_visible()
    await expect(tab.page.locator(".look")).to_be_hidden()
