"""Errors to JSON: whatever goes wrong becomes `{"error": {message, type, param, code}}`.

Rendering never raises: it writes ASCII, and nothing that came from the client but the names of
fields, and those only where they look like names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from service.api.anthropic.errors import is_message_path, message_error_body
from service.api.fields import FieldError
from service.errors import (
    BadRequest,
    MethodNotAllowed,
    NotFound,
    QuireError,
    RequestTimeout,
    TooLarge,
    Unauthorized,
)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "finite_number": "invalid_number",
    "string_unicode": "invalid_unicode",
    "string_too_short": "empty_string",
    "string_too_long": "string_above_max_length",
    "too_short": "array_below_min_length",
    "too_long": "array_above_max_length",
    "literal_error": "invalid_value",
    "int_parsing_size": "integer_above_max_value",
}
_BELOW = {"greater_than", "greater_than_equal"}
_ABOVE = {"less_than", "less_than_equal"}


def error_body(error: QuireError) -> bytes:
    """The JSON of an error, in ASCII."""
    fields = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
        **error.details(),
    }
    return json.dumps({"error": fields}).encode()


def error_headers(error: QuireError) -> dict[str, str]:
    """What an error says in headers: whether and when to come again."""
    headers = {}
    if error.status in {429, 503}:
        seconds = min(60.0, max(1.0, error.retry_after or 1.0))
        headers["retry-after"] = str(math.ceil(seconds))
        headers["retry-after-ms"] = str(math.ceil(seconds * 1000))
    if not error.retryable:
        headers["x-should-retry"] = "false"
    if isinstance(error, TooLarge | RequestTimeout) or error.code == "shutting_down":
        headers["connection"] = "close"
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(
    error: QuireError, headers: dict[str, str] | None = None, *, path: str = ""
) -> Response:
    """The whole HTTP answer of an error, in the shape of the path's clients."""
    return Response(
        message_error_body(error) if is_message_path(path) else error_body(error),
        status_code=error.status,
        headers=error_headers(error) | (headers or {}),
        media_type="application/json",
    )


def from_validation(errors: Sequence[Any]) -> BadRequest:
    """The first of pydantic's errors, as ours."""
    error = errors[0]
    param = _dotted(error["loc"])
    context = error.get("ctx") or {}
    cause = context.get("error")
    if isinstance(cause, FieldError):
        message = f"{param} {cause.message}" if param else cause.message
        return BadRequest(message, code=cause.code, param=param)
    message = error["msg"]
    return BadRequest(
        message[:1].lower() + message[1:], code=_code(error["type"], context), param=param
    )


def _code(kind: str, context: dict[str, Any]) -> str:
    if kind in _BELOW | _ABOVE:
        (limit,) = (context[name] for name in ("gt", "ge", "lt", "le") if name in context)
        noun = "integer" if isinstance(limit, int) else "decimal"
        return f"{noun}_below_min_value" if kind in _BELOW else f"{noun}_above_max_value"
    if kind.endswith("_type") or kind == "int_from_float":
        return "invalid_type"
    return _CODES.get(kind, "invalid_value")


def _dotted(location: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "content")` -> `messages[0].content`; odd names are cut off."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.startswith("("):
            continue  # the name of a union's member, which is no part of the path
        elif _NAME.fullmatch(part):
            path += f".{part}" if path else part
        else:
            break
    return path or None


def install(app: FastAPI) -> None:
    """Makes `app` answer all errors in our shape."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, QuireError)  # noqa: S101  # registered for it
        return error_response(error, path=request.scope["path"])

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101  # registered for it
        return error_response(from_validation(error.errors()), path=request.scope["path"])

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # registered for it
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_allowed(request))
        return error_response(_from_http(error), headers, path=request.scope["path"])

    async def left(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)  # nobody is there to read it

    async def unexpected(request: Request, _error: Exception) -> Response:
        # Starlette answers with this from outside of the boundary, and then raises: uvicorn logs.
        failure = QuireError("the server failed to answer this request")
        headers = {"x-request-id": request.state.request_id}
        return error_response(failure, headers, path=request.scope["path"])

    app.add_exception_handler(QuireError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, unexpected)


def _allowed(request: Request) -> list[str]:
    """The methods that some route knows at this address; the router tells of the first route's."""
    found = [
        method
        for method in ("DELETE", "GET", "POST")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]
    return [*found, "HEAD"] if "GET" in found else found


def _from_http(error: HTTPException) -> QuireError:
    if error.status_code == 404:
        return NotFound("there is nothing at this address", code="unknown_url")
    if error.status_code == 405:
        return MethodNotAllowed("this address does not know the method")
    if error.status_code < 500:
        return BadRequest("the request is malformed", code="invalid_request")
    return QuireError("the server failed to answer this request")
