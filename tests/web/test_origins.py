"""Pages of other sites in a real browser: what they can do with a server on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, async_playwright

from tests.conftest import ROOT, free_port, wait_until_ready
from tests.support.tiny_model import TinyModel
from tests.web.conftest import ARGUMENTS

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture(scope="module")
def other_port() -> int:
    """The URL of the other site's page."""
    return free_port()


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def other_site(other_port: int) -> AsyncIterator[str]:
    """An empty page of another origin."""
    page = b"<!doctype html><title>Other</title>"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: "

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")  # browsers also connect without a request
            writer.write(head + b"%d\r\n\r\n" % len(page) + page)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", other_port):
        yield f"http://127.0.0.1:{other_port}"


@pytest.fixture(scope="module")
def shared_server(
    other_port: int, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server that allows the other site's origin."""
    folder = tmp_path_factory.mktemp("shared")
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--admin-port", "0"]
    command += ["--model", str(tiny_model.write_folder(folder / "tiny"))]
    command += ["--cors-origins", f"http://127.0.0.1:{other_port}"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process, log=log)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


READ = """async ([url, model]) => {
  const body = {model, prompt: "the quick", max_tokens: 20, ignore_eos: true, stream: true};
  const headers = {"content-type": "application/json", "x-quire-event-ids": "1"};
  const options = {method: "POST", headers, body: JSON.stringify(body)};
  const answer = await fetch(url + "/v1/completions", options);
  const call = answer.headers.get("x-request-id");
  const whole = await answer.text();
  const seen = [...whole.matchAll(/^id: (.*)$/gm)].map(found => found[1]);
  const from = {headers: {"last-event-id": seen[4]}};
  const rest = await (await fetch(url + "/v1/streams/" + call, from)).text();
  return {whole, after: whole.slice(whole.indexOf(seen[4])), rest};
}"""


async def test_a_page_of_an_allowed_origin_streams_and_resumes(
    browser: Browser, other_site: str, shared_server: str
) -> None:
    context = await browser.new_context()
    try:
        page = await context.new_page()
        await page.goto(other_site)
        read: dict[str, Any] = await page.evaluate(READ, [shared_server, "tiny"])
    finally:
        await context.close()
    assert read["whole"].endswith("data: [DONE]\n\n")
    events = [line for line in read["after"].splitlines() if line.startswith("data: ")]
    rest = [line for line in read["rest"].splitlines() if line.startswith("data: ")]
    assert events[1:] == rest


REFUSED = """async url => {
  const options = {method: "POST", headers: {"content-type": "application/json"}, body: "{}"};
  try { await fetch(url + "/v1/completions", options); return "answered"; }
  catch (error) { return error.name; }
}"""


async def test_a_page_of_another_origin_is_rejected(
    browser: Browser, other_site: str, server_url: str
) -> None:
    context = await browser.new_context()
    try:
        page = await context.new_page()
        await page.goto(other_site)
        assert await page.evaluate(REFUSED, server_url) == "TypeError"
    finally:
        await context.close()


async def test_dns_rebinding_is_rejected(chromium: str, server_url: str) -> None:
    """A name of another site that resolves to the loopback: without the check the browser takes
    the server for that site, and its scripts may read all that it answers.
    """
    port = server_url.rsplit(":", 1)[1]
    arguments = [*ARGUMENTS, "--host-resolver-rules=MAP evil.example 127.0.0.1"]
    async with async_playwright() as playwright:
        rebound = await playwright.chromium.launch(executable_path=chromium, args=arguments)
        try:
            page = await rebound.new_page()
            answer = await page.goto(f"http://evil.example:{port}/v1/models")
            assert answer is not None
            assert answer.status == 403
            assert (await answer.json())["error"]["code"] == "host_not_allowed"
            answer = await page.goto(f"http://localhost:{port}/v1/models")
            assert answer is not None
            assert answer.status == 200
        finally:
            await rebound.close()
