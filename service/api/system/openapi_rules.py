"""JSON-schema rules for fields that depend on each other, by the name of a body's schema.

Validators of the models decide; these describe the same for readers and client generators.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Json = dict[str, Any]

_NULL = {"type": "null"}


def _when(name: str, value: object, then: Json, otherwise: Json) -> Json:
    condition = {"properties": {name: {"const": value}}, "required": [name]}
    return {"if": condition, "then": then, "else": otherwise}


def _present(name: str) -> Json:
    return {"properties": {name: {"not": _NULL}}, "required": [name]}


def _absent(*names: str) -> Json:
    return {"properties": dict.fromkeys(names, _NULL)}


def _one_of(*names: str) -> Json:
    """Exactly one of these is given."""
    return {
        "oneOf": [
            {"allOf": [_present(name), _absent(*(other for other in names if other != name))]}
            for name in names
        ]
    }


_STREAM_OPTIONS = {
    "if": _present("stream_options"),
    "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
}
_NOT_ASSISTANT = {
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
            _when("role", "assistant", {}, _NOT_ASSISTANT),
        ]
    },
    "InputMessage": _when("role", "assistant", {}, _NOT_ASSISTANT),
    "Turn": _when("role", "assistant", {}, _present("content")),
    "MessageToolChoice": _when("type", "tool", _present("name"), _absent("name")),
    "ResponseFormat": _when("type", "json_schema", _present("json_schema"), _absent("json_schema")),
    "TokenizeBody": _one_of("prompt", "messages"),
    "AttentionBody": _one_of("prompt", "messages", "tokens"),
    "StructuredOutputs": _one_of("json", "json_object", "regex", "choice", "grammar"),
    "CompletionBody": _STREAM_OPTIONS,
    "ChatBody": _STREAM_OPTIONS,
})  # fmt: skip
