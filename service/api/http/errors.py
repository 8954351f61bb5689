"""Errors as JSON: `{"error": {message, type, param, code}}`, or the form of the path's dialect.

Rendering never raises: it writes ASCII, and nothing from the client except the names of fields, if
they look like names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from service.api.http.fields import FieldError
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
# In place of pydantic's own words, which are about Python's types.
_PLAIN = {
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "list_type": "must be a list",
    "too_short": "must have {min_length} or more items",
    "too_long": "may have at most {max_length} items",
}
_BELOW = {"greater_than", "greater_than_equal"}
_ABOVE = {"less_than", "less_than_equal"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldNames:
    """A dialect's names of the fields that errors mention. The defaults are OpenAI's.

    `function` and `parameters` are formatted with the index of a tool.
    """

    prompt: str = "prompt"
    max_tokens: str = "max_tokens"
    stop: str = "stop"
    logprobs: str = "logprobs"
    output: str = "response_format"
    schema: str = "response_format.json_schema.schema"
    function: str = "tools[{}].function"
    parameters: str = "tools[{}].function.parameters"


class ErrorFormat(Protocol):
    """How a dialect returns errors."""

    @property
    def id_headers(self) -> Sequence[bytes]:
        """Response headers with the request id, in addition to x-request-id."""
        ...

    def error(self, error: QuireError) -> bytes:
        """The body of an error response, in ASCII."""
        ...


ErrorFormats = Callable[[str], ErrorFormat]
"""From a path to the format of its errors."""


def error_body(error: QuireError) -> bytes:
    """OpenAI's form of an error, in ASCII."""
    fields = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
        **error.details(),
    }
    return json.dumps({"error": fields}).encode()


def error_headers(error: QuireError) -> dict[str, str]:
    """The headers of an error: whether and when to retry."""
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
    error: QuireError, error_format: ErrorFormat, headers: dict[str, str] | None = None
) -> Response:
    """The HTTP response of an error."""
    return Response(
        error_format.error(error),
        status_code=error.status,
        headers=error_headers(error) | (headers or {}),
        media_type="application/json",
    )


def from_validation(errors: Sequence[Any]) -> BadRequest:
    """The first of pydantic's errors."""
    error = errors[0]
    param = _dotted(error["loc"])
    context = error.get("ctx") or {}
    cause = context.get("error")
    if isinstance(cause, FieldError):
        message = f"{param} {cause.message}" if param else cause.message
        return BadRequest(message, code=cause.code, param=param)
    message = error["msg"][:1].lower() + error["msg"][1:]
    if param:  # some clients show the message alone
        plain = _PLAIN.get(error["type"])
        message = f"{param} {plain.format(**context)}" if plain else f"{param}: {message}"
    return BadRequest(message, code=_code(error["type"], context), param=param)


def _code(kind: str, context: dict[str, Any]) -> str:
    if kind in _BELOW | _ABOVE:
        (limit,) = (context[name] for name in ("gt", "ge", "lt", "le") if name in context)
        noun = "integer" if isinstance(limit, int) else "decimal"
        return f"{noun}_below_min_value" if kind in _BELOW else f"{noun}_above_max_value"
    if kind.endswith("_type") or kind == "int_from_float":
        return "invalid_type"
    return _CODES.get(kind, "invalid_value")


def _dotted(location: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "content")` -> `messages[0].content`, up to an odd name."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.startswith("("):
            continue  # the name of a union's member, which is not part of the path
        elif _NAME.fullmatch(part):
            path += f".{part}" if path else part
        else:
            break
    return path or None


def install(app: FastAPI, error_formats: ErrorFormats) -> None:
    """Adds the error handlers to `app`."""

    def respond(
        request: Request, error: QuireError, headers: dict[str, str] | None = None
    ) -> Response:
        return error_response(error, error_formats(request.scope["path"]), headers)

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, QuireError)  # noqa: S101  # registered for it
        return respond(request, error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101  # registered for it
        return respond(request, from_validation(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # registered for it
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_allowed(request))
        return respond(request, _from_http(error), headers)

    async def disconnected(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)  # no client is there to read it

    async def unexpected(request: Request, _error: Exception) -> Response:
        # Starlette sends this outside of our middleware, and then raises: uvicorn logs.
        failure = QuireError("the server failed to answer this request")
        headers = {"x-request-id": request.state.request_id}
        return respond(request, failure, headers)

    app.add_exception_handler(QuireError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, disconnected)
    app.add_exception_handler(Exception, unexpected)


def _allowed(request: Request) -> list[str]:
    """The methods of all routes of this URL; the router would return the first route's."""
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
        return NotFound("not found: unknown URL", code="unknown_url")
    if error.status_code == 405:
        return MethodNotAllowed("method not allowed for this URL")
    if error.status_code < 500:
        return BadRequest("the request is malformed", code="invalid_request")
    return QuireError("the server failed to answer this request")
