"""GET / and /web/{name}: the web page, as static files without a build step.

All files come from this server: the content security policy forbids inline scripts, frames and
other origins. Browsers revalidate their copies, so an upgraded server never runs with an old page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Response

from service.errors import NotFound

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

IfNoneMatch = Annotated[str | None, Header(description="The ETag of the browser's copy.")]

_TEXT = {"schema": {"type": "string"}}
_ETAG = {"etag": {"description": "Changes with the content.", **_TEXT}}


def _described(*media_types: str) -> dict[int | str, dict[str, Any]]:
    content = {media_type.partition(";")[0]: _TEXT for media_type in media_types}
    return {
        200: {"description": "The file.", "content": content, "headers": _ETAG},
        304: {"description": "The browser's copy is current."},
    }


router = APIRouter()


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page; `tag` is its ETag."""

    content: bytes
    media_type: str
    tag: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """All files of the page by name, read once. No other file can be requested."""
    found = {}
    for entry in files("service").joinpath("web").iterdir():
        media_type = MEDIA_TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            found[entry.name] = PageFile(content, media_type, tag)
    return MappingProxyType(found)


@router.get("/", responses=_described(MEDIA_TYPES["html"]))
async def show_page(if_none_match: IfNoneMatch = None) -> Response:
    """Chat with the model in a browser, and see how likely each token was."""
    return _answer(INDEX, if_none_match)


@router.get("/web/{name}", responses=_described(*MEDIA_TYPES.values()))
async def show_file(
    name: Annotated[str, Path(description="The file's name.")], if_none_match: IfNoneMatch = None
) -> Response:
    """Scripts, styles and pictures of the page."""
    return _answer(name, if_none_match)


def _answer(name: str, known: str | None) -> Response:
    file = page_files().get(name)
    if file is None:
        raise NotFound("the page has no such file", code="not_found")
    headers = {**HEADERS, "etag": file.tag}
    if known is not None and file.tag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
