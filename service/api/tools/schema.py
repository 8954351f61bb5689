"""The wire types of tools: functions that a model may call, its calls, and who must be called.

What joins fields (a choice that names an unknown function, two functions of one name) is in
`tools`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetPydanticSchema,
    PlainValidator,
    WithJsonSchema,
)

from service.api.fields import FieldError, Label, Text, is_text
from service.api.wire import StrictModel

MAX_TOOLS = 128
MAX_DEPTH = 64
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Mode(StrEnum):
    """Whether the model calls functions."""

    NONE = "none"
    AUTO = "auto"  # as it likes
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What `tool_choice` says: a mode, or the one function that must be called."""

    mode: Mode
    name: str | None = None


def check_json(value: object) -> None:
    """Raises FieldError for what no JSON text can hold, and for what is nested too deep."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for node in level:
            if isinstance(node, dict):
                inner += node.keys()
                inner += node.values()
            elif isinstance(node, list):
                inner += node
            elif isinstance(node, str) and not is_text(node):
                raise FieldError("invalid_unicode", "must not hold a lone surrogate")
            elif isinstance(node, float) and not math.isfinite(node):
                raise FieldError("invalid_number", "must not hold NaN or Infinity")
        if not inner:
            return
        level = inner
    raise FieldError("invalid_json", f"may be nested at most {MAX_DEPTH} deep")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise FieldError("invalid_value", "must be 1 to 64 letters, digits, underscores or dashes")
    return value


def _parameters(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FieldError("invalid_type", "must be a JSON schema, which is an object")
    if value.get("type", "object") != "object":
        raise FieldError("invalid_value", 'must be a JSON schema of the type "object"')
    check_json(value)
    return value


def _arguments(value: str) -> str:
    """The arguments of an earlier call, as text; none at all are an empty object."""
    if not value.strip():
        return "{}"
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise FieldError("invalid_json", "must be the text of a JSON object")
    check_json(parsed)
    return value


def read_tool_choice(value: object, *, nested: bool) -> ToolChoice:
    """A mode's name, or the object that names a function; `nested`: as chat completions has it."""
    if isinstance(value, str):
        if value not in set(Mode):
            raise FieldError("invalid_value", "must be none, auto, required or name a function")
        return ToolChoice(Mode(value))
    if not isinstance(value, dict):
        raise FieldError("invalid_type", "must be a string or an object")
    if value.get("type") != "function":
        raise FieldError("invalid_value", 'can only name a tool of the type "function"')
    named = value.get("function") if nested else {k: v for k, v in value.items() if k != "type"}
    if not isinstance(named, dict) or set(named) != {"name"} or (nested and len(value) != 2):
        raise FieldError("invalid_value", "must hold the name of a function and nothing else")
    if not isinstance(named["name"], str):
        raise FieldError("invalid_type", "must name a function by a string")
    return ToolChoice(Mode.REQUIRED, _name(named["name"]))


def _chat_choice(value: object) -> ToolChoice | None:
    return None if value is None else read_tool_choice(value, nested=True)


_MODES: dict[str, Any] = {"type": "string", "enum": [mode.value for mode in Mode]}
_NAMED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": ["function"]},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}

FunctionName = Annotated[
    str,
    AfterValidator(_name),
    WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}),
]
Parameters = Annotated[dict[str, Any] | None, BeforeValidator(_parameters)]
Arguments = Annotated[Text, AfterValidator(_arguments)]
# Else what a choice becomes here would be listed among the schemas of the API.
Unlisted = GetPydanticSchema(lambda _source, handler: handler(Any))
ChatToolChoice = Annotated[
    ToolChoice | None,
    Unlisted,
    PlainValidator(_chat_choice),
    WithJsonSchema({"anyOf": [_MODES, _NAMED, {"type": "null"}]}),
]


class Function(StrictModel):
    """A function that the model may call."""

    name: FunctionName = Field(description="What the model calls it by.")
    description: Text | None = Field(None, description="For the model: what it does, and when.")
    parameters: Parameters = Field(
        None, description="The JSON schema of its arguments, an object. Default: it has none."
    )
    strict: bool | None = Field(
        None,
        description="Refuse a schema that cannot be followed to the letter. Default false: what "
        "it says beyond that is left to the model.",
    )


class FunctionTool(StrictModel):
    """A tool. Functions are the only kind."""

    type: Literal["function"] = Field(description="Which kind of tool it is.")
    function: Function = Field(description="The function.")


class CalledFunction(StrictModel):
    """Which function was called, and with what."""

    name: FunctionName = Field(description="The function.")
    arguments: Arguments = Field(description="The text of a JSON object.")


class CalledTool(StrictModel):
    """A call in an earlier message of the assistant."""

    id: Label = Field(description="What the message with the result names it by.")
    type: Literal["function"] | None = Field(None, description="Which kind of tool was called.")
    function: CalledFunction = Field(description="The call.")
    index: int | None = Field(
        None, ge=0, lt=MAX_TOOLS, description="Accepted for compatibility; has no effect."
    )


Tools = Annotated[list[FunctionTool] | None, Field(max_length=MAX_TOOLS)]
CalledTools = Annotated[list[CalledTool] | None, Field(max_length=MAX_TOOLS)]
