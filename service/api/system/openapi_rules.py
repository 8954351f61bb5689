"""What joins the fields of one object, as the OpenAPI document says it.

The code that decides stands with each type; this is its twin for readers and for generators of
clients. What joins objects, or needs the model, is in no schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Json = dict[str, Any]

_ABSENT = {"type": "null"}


def _when(name: str, value: object, then: Json, otherwise: Json) -> Json:
    condition = {"properties": {name: {"const": value}}, "required": [name]}
    return {"if": condition, "then": then, "else": otherwise}


def _present(name: str) -> Json:
    return {"properties": {name: {"not": _ABSENT}}, "required": [name]}


def _absent(*names: str) -> Json:
    return {"properties": dict.fromkeys(names, _ABSENT)}


def _needs(name: str, other: str) -> Json:
    """Where `name` is given, `other` must be true."""
    given = {"properties": {name: {"not": _ABSENT}}, "required": [name]}
    true = {"properties": {other: {"const": True}}, "required": [other]}
    return {"if": given, "then": true}


def _one_of(*names: str) -> Json:
    """Exactly one of these is given."""
    return {
        "oneOf": [
            {"allOf": [_present(name), _absent(*(other for other in names if other != name))]}
            for name in names
        ]
    }


_STREAMED = _needs("stream_options", "stream")

_NOT_THE_ASSISTANTS: Json = {
    "allOf": [
        _present("content"),
        {"properties": {"content": {"not": {"const": []}}}},
        _absent("tool_calls", "reasoning_content"),
    ]
}

RULES: Mapping[str, Json] = MappingProxyType({
    "Message": {
        "allOf": [
            _when("role", "tool", _present("tool_call_id"), _absent("tool_call_id")),
            _when("role", "assistant", {}, _NOT_THE_ASSISTANTS),
        ]
    },
    "InputMessage": _when("role", "assistant", {}, _NOT_THE_ASSISTANTS),
    "Turn": _when("role", "assistant", {}, _present("content")),
    "MessageToolChoice": _when("type", "tool", _present("name"), _absent("name")),
    "ResponseFormat": _when(
        "type", "json_schema", _present("json_schema"), _absent("json_schema")
    ),
    "TokenizeBody": _one_of("prompt", "messages"),
    "AttentionBody": _one_of("prompt", "messages", "tokens"),
    "StructuredOutputs": _one_of("json", "json_object", "regex", "choice", "grammar"),
    "CompletionBody": {"allOf": [_STREAMED]},
    "ChatBody": {"allOf": [_STREAMED]},
})  # fmt: skip
"""Name of a schema -> what is added to it."""
