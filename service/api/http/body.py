"""Bodies: from bytes to JSON, strictly. Fields are validated by the schemas, not here.

`JsonRoute` reads and parses the body before FastAPI sees it, so every error has our status and
code. Plain JSON in UTF-8 only: no byte order mark, no duplicate keys, no deep nesting. NaN and lone
surrogates are accepted here and rejected by the fields.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel

from service.api.http.context import ApiLimits, JsonRequest, get_context, get_tenant
from service.errors import BadRequest, RequestTimeout, TooLarge, UnsupportedMedia

_CONTENT_TYPE = re.compile(r"application/json\s*(;\s*charset=\"?utf-8\"?\s*)?", re.IGNORECASE)

MAX_BRACKETS = 2**17
"""Including those in strings. Each may be a list, and more lists block the event loop."""
MANY_VALUES = 2**15
MAX_MEMBERS = 2**17
"""Of one object. Making a larger dictionary blocks the event loop, from any thread."""


class DuplicateKeyError(ValueError):
    """An object has a key twice."""


def parse_json(data: bytes, *, max_depth: int) -> dict[str, Any]:
    """Parses a JSON object. Raises BadRequest."""
    brackets = data.count(b"[") + data.count(b"{")
    if brackets > MAX_BRACKETS:
        message = f"the body may have at most {MAX_BRACKETS} brackets"
        raise BadRequest(message, code="array_above_max_length")
    # The parser blocks all other threads, but not while it calls a function of ours.
    read_int = _integer if data.count(b",") > MANY_VALUES else None
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_int=read_int, parse_float=_number)
    except DuplicateKeyError:
        raise BadRequest("an object has a duplicate key", code="duplicate_key") from None
    except (ValueError, RecursionError):
        raise BadRequest("the body must be valid JSON in UTF-8", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_type")
    # Fewer brackets than the limit cannot exceed it: the usual case costs two scans.
    if brackets > max_depth and _depth_exceeds(value, max_depth):
        raise BadRequest(f"JSON may be nested at most {max_depth} deep", code="invalid_json")
    return value


def _integer(digits: str) -> int:
    return int(digits)


def _number(digits: str) -> float:
    """Numbers with an integer value are integers, also if written as 2.0 or 1e3."""
    value = float(digits)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_MEMBERS:
        message = f"an object may have at most {MAX_MEMBERS} members"
        raise BadRequest(message, code="object_above_max_length")
    value = dict(pairs)
    if len(value) != len(pairs):
        raise DuplicateKeyError
    return value


def _depth_exceeds(value: object, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        children: list[Any] = []
        for node in level:
            inner = node.values() if isinstance(node, dict) else node
            children.extend(child for child in inner if isinstance(child, dict | list))
        if not children:
            return False
        level = children
    return True


async def read_body(request: Request, limits: ApiLimits) -> bytes:
    """All bytes of the body. Raises TooLarge without reading more than `max_body_bytes`."""
    if not _CONTENT_TYPE.fullmatch(request.headers.get("content-type", "")):
        raise UnsupportedMedia("the Content-Type must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("the body must not be compressed")
    too_large = TooLarge(f"the body may have at most {limits.max_body_bytes} bytes")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > limits.max_body_bytes:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_body_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise RequestTimeout(f"the body must arrive in {limits.body_timeout:g} seconds") from None
    return b"".join(chunks)


class JsonRoute(APIRoute):
    """A route whose handler receives a strictly parsed body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Calls FastAPI's handler with a `JsonRequest`."""
        handle = super().get_route_handler()
        field = self.body_field
        if field is None:
            return handle

        def parse_and_check(data: bytes, limits: ApiLimits) -> BaseModel:
            parsed = parse_json(data, max_depth=limits.max_json_depth)
            model, errors = field.validate(parsed, {}, loc=("body",))
            if errors:
                raise RequestValidationError(errors)
            assert isinstance(model, BaseModel)  # noqa: S101  # all our bodies are
            return model

        async def read_then_handle(request: Request) -> Response:
            limits = get_context(request).limits
            whole = JsonRequest(request.scope, request.receive)
            whole.raw = await read_body(request, limits)
            if len(whole.raw) > limits.inline_body_bytes:
                parse = partial(parse_and_check, whole.raw, limits)
                bodies, tenant = get_context(request).pools.bodies, get_tenant(request)
                whole.parsed = await bodies.run(tenant.name, parse, weight=len(whole.raw))
            else:
                whole.parsed = parse_json(whole.raw, max_depth=limits.max_json_depth)
            return await handle(whole)

        return read_then_handle
