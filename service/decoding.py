"""Decoding of stored JSON into dataclasses, which another version may have written.

Checks the type of each value. Ignores unknown fields and gives missing ones their defaults, so that
older and newer versions can read a record. A field that an answer depends on must not be ignored:
the request names it in its `features`, so that an engine without it does not claim the request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_Reader = Callable[[Any], Any]
"""Returns the field's value. Raises TypeError or ValueError."""


def decode(kind: type[T], text: str | bytes) -> T:
    """A dataclass from a JSON object. Raises ValueError or TypeError if it is malformed."""
    return from_object(kind, json.loads(text))


def from_object(kind: type[T], value: object) -> T:
    """As `decode`, from a parsed object."""
    if type(value) is not dict:
        raise TypeError(f"{kind.__name__} must be an object")
    readers = _readers(kind)  # type: ignore[arg-type]  # a class is hashable
    return kind(**{name: readers[name](value[name]) for name in readers.keys() & value.keys()})


@cache
def _readers(kind: type[Any]) -> dict[str, _Reader]:
    hints = get_type_hints(kind)
    return {field.name: _reader(hints[field.name]) for field in fields(kind)}


def _reader(hint: Any) -> _Reader:  # noqa: ANN401 - a type or a generic alias
    """For the types in stored dataclasses. Raises TypeError for any other."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None:
        return _plain_reader(hint)
    if origin in {Union, UnionType}:
        return partial(_read_union, [_reader(each) for each in arguments])
    if origin is tuple and arguments[-1] is Ellipsis:
        return partial(_read_tuple, arguments[0], _reader(arguments[0]))
    if origin is tuple:
        return partial(_read_pair, [_reader(each) for each in arguments])
    if origin is dict:
        return partial(_read_exact, dict)
    raise TypeError(f"no decoding for {hint}")


def _plain_reader(hint: type[Any]) -> _Reader:
    if hint is float:
        return _read_float
    if hint in {int, str, bool, NoneType}:
        return partial(_read_exact, hint)
    if is_dataclass(hint):
        return partial(from_object, hint)
    if issubclass(hint, Enum):
        return hint
    raise TypeError(f"no decoding for {hint}")


def _read_exact(kind: type[Any], value: object) -> object:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected")
    return value


def _read_float(value: object) -> float:
    if type(value) not in {int, float}:
        raise TypeError("number expected")
    try:
        return float(value)  # type: ignore[arg-type]  # it is a number
    except OverflowError as error:
        raise ValueError("number out of range") from error


def _read_tuple(kind: object, reader: _Reader, value: object) -> tuple[Any, ...]:
    """Of any length. A prompt may have 100,000 tokens, so their types are checked together."""
    items: list[Any] = _read_list(value)
    if kind is int and set(map(type, items)) <= {int}:
        return tuple(items)
    return tuple(reader(item) for item in items)


def _read_pair(readers: Sequence[_Reader], value: object) -> tuple[Any, ...]:
    """Of a fixed length."""
    items = _read_list(value)
    return tuple(reader(item) for reader, item in zip(readers, items, strict=True))


def _read_list(value: object) -> list[Any]:
    if type(value) is not list:
        raise TypeError("list expected")
    return value


def _read_union(readers: Sequence[_Reader], value: object) -> object:
    """The first type that fits."""
    for reader in readers[:-1]:
        try:
            return reader(value)
        except (TypeError, ValueError):
            continue
    return readers[-1](value)
