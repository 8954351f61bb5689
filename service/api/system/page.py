"""GET / and /web/{name}: the page for people, as static files that nothing is built for.

Everything comes from this server and nothing may come from elsewhere: the policy that is sent along
forbids inline scripts, frames and other origins. A browser asks each time whether its copy is still
good, so an upgraded server is never shown with an old page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response

from service.errors import NotFound

router = APIRouter()

INDEX = "index.html"
MEDIA_TYPES = MappingProxyType({
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
})  # fmt: skip
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = MappingProxyType({
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
})  # fmt: skip

KnownCopy = Annotated[str | None, Header(description="The tag of the copy that the browser has.")]


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file of the page; `tag` changes with its content."""

    content: bytes
    media_type: str
    tag: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """All files of the page by name, read once. What is not among them cannot be asked for."""
    found = {}
    for entry in files("service").joinpath("web").iterdir():
        media_type = MEDIA_TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            found[entry.name] = PageFile(content, media_type, tag)
    return MappingProxyType(found)


@router.get(
    "/",
    summary="The page",
    description="Chat with the model in a browser, and see how likely each token was.",
    response_model=None,
)
async def show_page(if_none_match: KnownCopy = None) -> Response:
    """The page itself."""
    return _answer(INDEX, if_none_match)


@router.get(
    "/web/{name}",
    summary="The page's parts",
    description="Scripts, styles and pictures of the page.",
    response_model=None,
)
async def show_part(
    name: Annotated[str, Path(description="The file's name.")], if_none_match: KnownCopy = None
) -> Response:
    """A file that the page is made of. Raises NotFound for all others."""
    return _answer(name, if_none_match)


def _answer(name: str, known: str | None) -> Response:
    asked = page_files().get(name)
    if asked is None:
        raise NotFound("the page has no such part", code="not_found")
    headers = {**HEADERS, "etag": asked.tag}
    if known is not None and asked.tag in known:
        return Response(status_code=304, headers=headers)
    return Response(asked.content, media_type=asked.media_type, headers=headers)
