"""GET /openapi.json and /docs: the API's document for machines, and a page that shows it.

Served only if no keys are needed: a browser that opens a page sends no key. Making the document
takes tenths of a second, so it is made in a thread, once per model card, and kept as bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html

from service.api.context import Context
from service.messages import ModelCard

router = APIRouter(include_in_schema=False)

DOCUMENT = "/openapi.json"


class DocumentCache:
    """The rendered document of the model that is served now."""

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        self._make = make
        self._card: ModelCard | None = None
        self._rendering: asyncio.Task[bytes] | None = None

    async def body(self, card: ModelCard) -> bytes:
        """The document as JSON. Requests that come while it is made wait for the same bytes."""
        if self._rendering is None or card != self._card:
            self._card = card
            self._rendering = asyncio.create_task(asyncio.to_thread(self._render))
        return await asyncio.shield(self._rendering)  # a client that leaves does not cancel it

    def _render(self) -> bytes:
        return orjson.dumps(self._make())


@router.get(
    DOCUMENT,
    summary="The OpenAPI document",
    description="Every endpoint, field, limit and error, for machines.",
    response_model=None,
)
async def show_document(request: Request, context: Context) -> Response:
    """The document of this server's model and limits."""
    cache = request.app.state.document
    assert isinstance(cache, DocumentCache)  # noqa: S101  # document.install puts it there
    return Response(await cache.body(context.card), media_type="application/json")


@router.get(
    "/docs",
    summary="The OpenAPI document as a page",
    description="Swagger UI. Its scripts come from a public CDN, not from this server.",
    response_model=None,
)
async def show_docs(request: Request) -> Response:
    """A page that shows the document and tries its endpoints."""
    return get_swagger_ui_html(openapi_url=DOCUMENT, title=request.app.title)
