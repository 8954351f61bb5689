"""The page's files as they are served: all of them, no others, and nothing inline."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser

import httpx
import pytest
from fastapi import FastAPI

from service.api import dialect_of
from service.api.http import errors
from service.api.system import page


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    errors.install(app, dialect_of)
    app.include_router(page.router)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_every_file_is_served_with_its_type_and_the_policy(client: httpx.AsyncClient) -> None:
    names = page.page_files()
    assert {"index.html", "app.js", "style.css", "icon.svg"} <= names.keys()
    for path in ("/", *(f"/web/{name}" for name in names)):
        reply = await client.get(path)
        assert reply.status_code == 200
        suffix = path.rpartition(".")[2] if path != "/" else "html"
        assert reply.headers["content-type"] == page.MEDIA_TYPES[suffix]
        assert reply.headers["x-content-type-options"] == "nosniff"
        policy = dict(part.split(" ", 1) for part in page.POLICY.split("; "))
        assert reply.headers["content-security-policy"] == page.POLICY
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == "'self'"


async def test_a_browsers_copy_is_confirmed_or_replaced(client: httpx.AsyncClient) -> None:
    fresh = await client.get("/web/app.js")
    assert fresh.headers["cache-control"] == "no-cache"
    tag = fresh.headers["etag"]
    known = await client.get("/web/app.js", headers={"if-none-match": tag})
    assert (known.status_code, known.content) == (304, b"")
    stale = await client.get("/web/app.js", headers={"if-none-match": '"another"'})
    assert stale.content == fresh.content


@pytest.mark.parametrize("name", ["nope.js", "..%2fapi%2fpage.py", "%2e%2e", "page.py", "%00"])
async def test_no_other_file_can_be_requested(client: httpx.AsyncClient, name: str) -> None:
    reply = await client.get(f"/web/{name}")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] in {"not_found", "unknown_url"}


class _Tags(HTMLParser):
    """The files that a document links, and its inline code."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []
        self.inline: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        for name, value in attrs:
            if name == "src" or (name == "href" and tag == "link"):
                self.files.append(value or "")
            if name.startswith("on") or name == "style":
                self.inline.append(f"{tag} {name}")

    def handle_data(self, data: str) -> None:
        if self._inside in {"script", "style"} and data.strip():
            self.inline.append(self._inside)


def test_the_document_links_existing_files_and_has_no_inline_code() -> None:
    files = page.page_files()
    tags = _Tags()
    tags.feed(files["index.html"].content.decode())
    assert tags.inline == []
    assert tags.files
    assert {file.removeprefix("/web/") for file in tags.files} <= files.keys()
    for name, file in files.items():
        if name.endswith(".js"):
            imported = re.findall(r'from "\./([\w.]+)"', file.content.decode())
            assert set(imported) <= files.keys(), name
