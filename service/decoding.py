"""Decoding of stored JSON into dataclasses, which another version may have written.

Checks the type of each value. Ignores unknown fields and gives missing ones their defaults, so that
older and newer versions can read a record. A field that an answer depends on must not be ignored:
the request names it in its `features`, so that an engine without it does not claim the request.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


def decode(kind: type[T], text: str | bytes) -> T:
    """A dataclass from a JSON object. Raises ValueError if it is malformed."""
    decoded: T = _adapter(kind).validate_json(text, strict=True)  # type: ignore[arg-type]  # a class is hashable
    return decoded


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
