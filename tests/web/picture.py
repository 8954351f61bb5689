"""Draws .github/page.png anew: `python -m tests.web.picture`, with Chromium and the default model.

A chat with a fixed seed while two other streams run; the pointer is on a token of the answer.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from playwright.async_api import ViewportSize, async_playwright, expect

from model.checkpoint.fetch import default_cache, resolve
from service.bench.client import Target, drive
from service.bench.workloads import make_prompts
from tests.conftest import ROOT, default, serving
from tests.support.waiting import PATIENCE
from tests.web.conftest import ARGUMENTS

_PICTURE = ROOT / ".github" / "page.png"
_SIZE: ViewportSize = {"width": 1120, "height": 760}
_SEED = "5"
_QUESTION = "Write a Python function that reverses a string."
_MODEL = "smollm2-135m-instruct"


async def draw(url: str) -> None:
    """Asks the question and takes the picture while the other streams run."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = await browser.new_page(viewport=_SIZE, color_scheme="light")
        await page.goto(url)
        await page.fill("#seed", _SEED)
        await page.fill("#question", _QUESTION)
        await page.press("#question", "Enter")
        running = asyncio.create_task(_load(url))
        answer = page.locator("li.assistant").last
        await expect(answer).not_to_have_class("assistant running", timeout=3e3 * PATIENCE)
        shown = page.locator(".answer p [data-token]")
        await shown.nth(await shown.count() // 2).hover()
        await expect(page.locator("#tip")).to_be_visible()
        await page.screenshot(path=_PICTURE)
        running.cancel()
        await browser.close()


async def _load(url: str) -> None:
    target = Target(port=urlsplit(url).port or 0, fields={"model": _MODEL, "ignore_eos": True})
    prompts = make_prompts("picture", count=8, num_tokens=32)
    await drive(target, prompts, clients=2, max_tokens=1000)


def main() -> None:
    """Starts a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = resolve("", cache=default_cache())
        with serving(*default(model), log=Path(folder) / "log") as url:
            asyncio.run(draw(url))


if __name__ == "__main__":
    main()
