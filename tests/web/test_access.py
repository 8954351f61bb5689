"""Accessibility: keyboard only, narrow windows, dark colours, screen readers."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.async_api import Page, expect

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

PHONE = {"width": 360, "height": 740}
WIDE = {"width": 1180, "height": 760}
CODE = "Write a Python function with a very long line of code, in a code block."


async def lightness(page: Page) -> float:
    """Mean of the page's background, 0 to 255."""
    rgb: list[float] = await page.evaluate(
        "getComputedStyle(document.documentElement).backgroundColor.match(/[\\d.]+/g).map(Number)"
    )
    return sum(rgb[:3]) / 3


async def test_colours_follow_the_system_until_switched(visit: Any) -> None:
    light = await visit(color_scheme="light")
    dark = await visit(color_scheme="dark")
    assert await lightness(light.page) > 200
    assert await lightness(dark.page) < 60
    switch = light.page.get_by_role("button", name="Dark colours")
    await expect(switch).to_have_attribute("aria-pressed", "false")
    await switch.click()
    await expect(switch).to_have_attribute("aria-pressed", "true")
    assert await lightness(light.page) < 60
    await light.page.reload()
    await expect(light.page.locator("#engine-state")).to_have_text("ready")
    assert await lightness(light.page) < 60


async def test_everything_can_be_done_from_the_keyboard(visit: Any, slow_steps: Any) -> None:
    tab = await visit(viewport=WIDE)
    press = tab.page.keyboard.press
    await press("Tab")
    await expect(tab.page.locator(".skip")).to_be_focused()
    await press("Enter")
    await expect(tab.page.locator("#question")).to_be_focused()
    await tab.page.keyboard.type("Write a very long story")
    await press("Shift+Enter")
    await tab.page.keyboard.type("in two lines.")
    assert await tab.page.input_value("#question") == "Write a very long story\nin two lines."
    await press("Enter")
    await tab.shown(20)
    await press("Escape")
    await tab.ended()
    assert (await tab.record())["reason"] == "cancelled"
    reached, unseen = await walk(tab.page)
    assert reached >= {
        "new-chat", "export-open", "theme", "scroll", "answer", "seed 1", "Tokens", "Attention",
        "Copy", "Again", "question", "send", "system", "temperature", "top_p", "max_tokens", "seed",
        "extra", "Defaults",
    }  # fmt: skip
    assert unseen == [], "where the focus is can be seen"
    export = tab.page.locator("#export-open")
    await export.focus()
    await press("Enter")
    await expect(tab.page.locator("#export-language")).to_be_focused()
    await expect(tab.page.locator("#export-code")).to_contain_text("curl ")
    await tab.page.keyboard.type("P")
    await expect(tab.page.locator("#export-code")).to_contain_text("from openai import OpenAI")
    for name in ("#export-copy", "#export-close", "#export pre"):
        await press("Tab")
        await expect(tab.page.locator(name)).to_be_focused()
    await press("Escape")
    await expect(tab.page.locator("#export")).to_be_hidden()
    await expect(export).to_be_focused()
    await tab.page.focus("#new-chat")
    await press("Enter")
    await expect(tab.page.locator("#messages > li")).to_have_count(0)
    await expect(tab.page.locator("#question")).to_be_focused()


async def walk(page: Page) -> tuple[set[str], list[str]]:
    """Names of the elements that Tab reaches, and of those that show no focus."""
    reached: list[str] = []
    unseen: list[str] = []
    await page.evaluate("document.activeElement.blur()")
    for _ in range(60):
        await page.keyboard.press("Tab")
        name, seen = await page.evaluate(
            """() => {
              const here = document.activeElement;
              if (here === document.body) return ['the end', true];
              const shown = here.closest('.field') ?? here;
              const name = here.id || (here.className === 'answer' ? 'answer' : here.textContent);
              const style = getComputedStyle(shown);
              const ring = style.outlineStyle !== 'none' || style.boxShadow.includes('0px 1px');
              return [name.trim().replace(/^seed \\d+$/, 'seed 1'), ring];
            }"""
        )
        if name == "the end":
            continue
        if name in reached:
            break
        reached.append(name)
        if not seen:
            unseen.append(name)
    return set(reached), unseen


async def test_nothing_is_wider_than_a_phone(visit: Any, overflow: Any) -> None:
    tab = await visit(viewport=PHONE, has_touch=True, is_mobile=True)
    await tab.page.locator("#panel-switch").tap()
    await expect(tab.page.locator("#max_tokens")).to_be_visible()
    await tab.set(seed=7, max_tokens=150)
    assert await overflow(tab.page) == []
    await tab.page.locator("#panel-switch").tap()
    await tab.ask(CODE + "x" * 200)
    await tab.ended()
    assert await overflow(tab.page) == []
    await tab.page.get_by_role("button", name="Tokens", exact=True).tap()
    assert await overflow(tab.page) == []
    token = tab.page.locator(".answer [data-token]").last
    await token.tap()
    await expect(tab.page.locator("#tip")).to_be_visible()
    assert await overflow(tab.page) == []
    await token.tap()
    await expect(tab.page.locator("#tip")).to_be_hidden()


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
async def test_axe_finds_nothing(visit: Any, findings: Any, colours: str, viewport: Any) -> None:
    tab = await visit(viewport=viewport, color_scheme=colours, reduced_motion="reduce")
    assert await findings(tab.page) == []
    if viewport is PHONE:
        await tab.page.click("#panel-switch")
        assert await findings(tab.page) == []
    await tab.set(seed=7, max_tokens=60)
    if viewport is PHONE:
        await tab.page.click("#panel-switch")
    await tab.ask(CODE)
    await tab.ended()
    await tab.page.locator(".answer [data-token]").nth(2).click()
    assert await findings(tab.page) == []
    await tab.page.get_by_role("button", name="Tokens", exact=True).click()
    assert await findings(tab.page) == []
    await tab.ask(CODE)
    await tab.ended()  # two answers: names of their parts may not clash
    await tab.page.get_by_role("button", name="Attention").first.click()
    await tab.page.get_by_role("button", name="Attention").last.click()
    await expect(tab.page.locator(".heat:visible")).to_have_count(2)
    assert await findings(tab.page) == []
    await tab.page.click("#export-open")
    assert await findings(tab.page) == []
