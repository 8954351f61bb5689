"""The errors of the OpenAPI document: each status with its meaning and its headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

_RETRY = {
    "retry-after": {
        "description": "Seconds after which to come again.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 60},
    },
    "retry-after-ms": {
        "description": "The same in milliseconds.",
        "schema": {"type": "integer", "minimum": 1000, "maximum": 60_000},
    },
}
_CLOSE = {
    "connection": {
        "description": "`close`: nothing more is read.",
        "schema": {"type": "string", "enum": ["close"]},
    }
}
_FINAL = {
    "x-should-retry": {
        "description": "`false` where the same request cannot succeed.",
        "schema": {"type": "string", "enum": ["false"]},
    }
}
_KEY = {
    "www-authenticate": {
        "description": "How to show a key.",
        "schema": {"type": "string", "enum": ["Bearer"]},
    }
}

STATUSES: Mapping[int, tuple[str, dict[str, Any]]] = MappingProxyType({
    400: ("The request cannot be served as it is; `param` names the field at fault.", {}),
    401: ("No valid key was shown.", _KEY),
    403: ("The key has no right to this.", {}),
    404: ("There is no such model, stream, response or part here.", _FINAL),
    408: ("The body did not arrive in time.", _CLOSE),
    409: ("The idempotency key came with another body, or the journal differs.", _FINAL),
    410: ("What was asked for is no longer kept.", _FINAL),
    413: ("The body is over the limit.", _CLOSE),
    414: ("The URL is over the limit.", _CLOSE),
    415: ("The body is not plain JSON.", {}),
    429: ("The key is over its own limit.", _RETRY),
    431: ("The headers are over a limit.", _CLOSE),
    500: ("The server failed, or the engine gave the request up.", _FINAL),
    503: ("The queue is full or away, no engine is there, or the replica ends.", _RETRY),
    504: ("The time given was over before the first token.", {}),
})  # fmt: skip
"""Status -> its meaning, and the headers that it may have."""


def error_answers(statuses: Iterable[int], shape: str) -> dict[str, Any]:
    """The answers of an operation that may fail so, with bodies of this schema."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
    return {
        str(status): {
            "description": STATUSES[status][0],
            "content": content,
            "headers": dict(STATUSES[status][1]),
        }
        for status in statuses
    }
