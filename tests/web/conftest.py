"""A real Chromium and a real server, and the checks of every test of the page."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio
from axe_playwright_python.base import AXE_FILE_PATH
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

from tests.conftest import default, serving
from tests.support.waiting import PATIENCE

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic",
    "--no-first-run", "--disable-component-update", "--disable-sync",
)  # fmt: skip
CHAT = "JSON.parse(localStorage.getItem('quire.chat.1')).messages"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path. Without a browser the tests fail."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("missing: chromium (Debian: apt-get install chromium)", pytrace=False)
    return path


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """One browser per session; each test has its own contexts."""
    expect.set_options(timeout=1e3 * PATIENCE)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        await browser.close()


@pytest.fixture(scope="session")
def slow_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While it exists, the steps of `server_url` are slow."""
    return tmp_path_factory.mktemp("slow") / "slow"


@pytest.fixture(scope="session")
def server_url(default_model: Path, slow_file: Path) -> Iterator[str]:
    """A real server with the default model whose steps can be slow."""
    program = ["tests.support.slow_service", "0.1", str(slow_file)]
    log = slow_file.with_name("log")
    with serving(*default(default_model), log=log, program=program) as url:
        yield url


@pytest.fixture
def slow_steps(slow_file: Path) -> Iterator[Callable[[], None]]:
    """Makes the steps slow until the test calls it: what a test does during an answer then
    happens during it, however fast the machine is.
    """
    slow_file.touch()

    def end() -> None:
        slow_file.unlink(missing_ok=True)

    yield end
    end()


@dataclass
class Visit:
    """A tab with the page, and the errors in it."""

    page: Page
    context: BrowserContext
    origin: str
    errors: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    network_may_fail: bool = False  # the browser reports a lost connection as an error

    def watch(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("request", lambda request: self._check(request.url))

    def _note(self, message: Any) -> None:
        if self.network_may_fail and "net::ERR" in message.text:
            return
        if message.type in {"error", "warning"}:
            self.errors.append(message.text)

    def _check(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme in {"http", "https", "ws", "wss"} and not url.startswith(self.origin + "/"):
            self.strangers.append(url)

    async def set(self, **values: object) -> None:
        """Fills fields of the settings by their ids."""
        for name, value in values.items():
            await self.page.fill(f"#{name}", str(value))

    async def ask(self, question: str) -> None:
        await self.page.fill("#question", question)
        await self.page.press("#question", "Enter")

    async def shown(self, characters: int) -> None:
        """Waits until the last answer shows this much text."""
        await self.page.wait_for_function(
            "n => [...document.querySelectorAll('.answer')].at(-1)?.textContent.length >= n",
            arg=characters,
        )

    async def begun(self) -> None:
        """Waits until the page has saved the call id of the last answer."""
        await self.page.wait_for_function(f"() => {CHAT}.at(-1).call")

    async def ended(self) -> None:
        await expect(self.page.locator("li.assistant").last).not_to_have_class(
            "assistant running", timeout=3e3 * PATIENCE
        )

    async def record(self) -> dict[str, Any]:
        """The last message as the page stores it."""
        return cast("dict[str, Any]", await self.page.evaluate(f"{CHAT}.at(-1)"))


Open = Callable[..., Awaitable[Visit]]


@pytest_asyncio.fixture(loop_scope="session")
async def visit(browser: Browser, server_url: str) -> AsyncIterator[Open]:
    """`await visit()` or `await visit(url, viewport=..., color_scheme=...)`. Afterwards nothing may
    have been wrong in any of them, and nothing asked of anybody else.
    """
    visits: list[Visit] = []

    async def open_page(url: str = server_url, **options: Any) -> Visit:
        context = await browser.new_context(**options)
        context.set_default_timeout(1e3 * PATIENCE)
        page = await context.new_page()
        opened = Visit(page, context, url)
        visits.append(opened)
        opened.watch()
        await page.goto(f"{url}/")
        await expect(page.locator("#engine-state")).to_have_text("ready")
        return opened

    yield open_page
    for opened in visits:
        await opened.context.close()
    assert [opened.errors for opened in visits] == [[] for _ in visits]
    assert [opened.strangers for opened in visits] == [[] for _ in visits]


Undisturbed = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture(scope="session")
def undisturbed() -> Undisturbed:
    """The choice that an API client gets for a question, not streamed."""

    async def ask(url: str, question: str, **fields: Any) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            messages = [{"role": "user", "content": question}]
            body = {"model": model, "messages": messages, "temperature": 0.7, "top_p": 0.95}
            answer = await client.post("/v1/chat/completions", json=body | fields)
        assert answer.status_code == 200, answer.text
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    return ask


Faults = Callable[[Page], Awaitable[list[str]]]


@pytest.fixture(scope="session")
def overflow() -> Faults:
    """`await overflow(page)`: elements wider than the window."""
    return _overflow


async def _overflow(page: Page) -> list[str]:
    """Elements that extend beyond the window or scroll sideways, except code blocks."""
    found: list[str] = await page.evaluate(
        """() => [...document.querySelectorAll('body, body *')]
          .filter((e) => e.checkVisibility() && !e.closest('pre, .hidden, .skip'))
          .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 || e.scrollLeft > 0)
          .map((e) => e.tagName + '#' + e.id + '.' + e.className)"""
    )
    scrolled = await page.evaluate("document.documentElement.scrollWidth > innerWidth")
    return found + (["the page"] if scrolled else [])


@pytest.fixture(scope="session")
def findings() -> Faults:
    """`await findings(page)`: violations found by axe-core."""
    return _findings


async def _findings(page: Page) -> list[str]:
    """Violations of any severity, each with its elements."""
    await page.evaluate(AXE_FILE_PATH.read_text(encoding="utf-8"))
    result = await page.evaluate("axe.run()")
    assert len(result["passes"]) > 10
    return [
        f"{violation['id']}: {node['target']} {node['failureSummary']}"
        for violation in result["violations"]
        for node in violation["nodes"]
    ]
