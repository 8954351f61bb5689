"""The page of a server with keys: it asks for a key, keeps it until the tab closes, and works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import expect

from service.keys import new_entry, new_secret
from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

SECRET = new_secret()


@pytest.fixture
def keyed_url(default_model: Path, tmp_path: Path) -> Iterator[str]:
    """A real server that requires keys."""
    keys, log = tmp_path / "keys.toml", tmp_path / "log"
    keys.write_text(new_entry(SECRET, name="alice"))
    port = free_port()
    command = [sys.executable, "-m", "service", "serve", "--model", str(default_model)]
    command += ["--port", str(port), "--admin-port", "0", "--keys-file", str(keys)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, log=log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 0, log.read_text()
    assert SECRET not in log.read_text()


async def test_the_page_asks_for_a_key_and_works_with_it(browser: Any, keyed_url: str) -> None:
    context = await browser.new_context()
    page = await context.new_page()
    await page.goto(f"{keyed_url}/")
    field = page.locator("#key")
    await expect(field).to_be_hidden()
    await expect(page.locator("#engine-state")).to_have_text("key needed")
    await page.fill("#max_tokens", "12")
    await page.fill("#question", "Name three colours.")
    await page.press("#question", "Enter")
    await expect(field).to_be_focused()
    await field.fill(SECRET[:-1])
    await page.fill("#question", "Name three colours.")
    await page.press("#question", "Enter")
    await expect(field).to_be_focused()
    await field.fill(SECRET)
    await expect(page.locator("#engine-state")).to_have_text("ready")
    await page.fill("#question", "Name three colours.")
    await page.press("#question", "Enter")
    answer = page.locator(".answer").last
    await expect(answer).to_contain_text(" ")
    await expect(page.locator("li.assistant").last).not_to_have_class("assistant running")
    await page.reload()
    await expect(page.locator("#engine-state")).to_have_text("ready")
    assert await page.evaluate("JSON.stringify(localStorage)") is not None
    assert SECRET not in await page.evaluate("JSON.stringify(localStorage)"), "in this tab alone"
    await context.close()
