"""Errors in Anthropic's shape, `{"type": "error", "error": {type, message}}`, on the paths where
its clients call. Statuses and headers are those of every other path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from service.errors import BadRequest, QuireError, ShuttingDown

PATH = "/v1/messages"
MESSAGE_ID = b"request-id"
"""The header that its clients look for a call's id in."""

_TYPES: Mapping[int, str] = MappingProxyType({
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
})  # fmt: skip


def is_message_path(path: str) -> bool:
    """Whether it is one that Anthropic's clients call."""
    return path == PATH or path.startswith(PATH + "/")


def message_error_body(error: QuireError) -> bytes:
    """The JSON of an error, in ASCII. The shape has no place for a field: the message names it."""
    kind = "invalid_request_error" if isinstance(error, BadRequest) else "api_error"
    message = error.message
    if error.param is not None and not message.startswith(error.param):
        message = f"{error.param}: {message}"
    fields = {"type": _TYPES.get(error.status, kind), "message": message}
    if isinstance(error, ShuttingDown):
        fields |= {"code": error.code, **error.details()}
    return json.dumps({"type": "error", "error": fields}).encode()
