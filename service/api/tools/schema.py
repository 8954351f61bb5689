"""The wire types of tools: functions, earlier calls, and the tool choice.

Each field is checked by itself; `tool_use` checks fields that depend on each other.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetPydanticSchema,
    PlainValidator,
    WithJsonSchema,
)

from service.api.fields import FieldError, Label, StrictModel, Text, check_json
from service.api.tools.chat import FunctionDefinition, Mode, ToolCall, ToolChoice

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise FieldError("invalid_value", "must be 1 to 64 letters, digits, underscores or dashes")
    return value


def _parameters(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FieldError("invalid_type", "must be a JSON schema (an object)")
    if value.get("type", "object") != "object":
        raise FieldError("invalid_value", 'must be a JSON schema of the type "object"')
    check_json(value)
    return value


def _arguments(value: str) -> str:
    """The arguments of an earlier call, as JSON text; blank text means an empty object."""
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
    """Parses a mode, or an object that names a function: below "function" if `nested`."""
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
# Otherwise the parsed type would be listed among the schemas of the OpenAPI document.
Unlisted = GetPydanticSchema(lambda _source, handler: handler(Any))
ChatToolChoice = Annotated[
    ToolChoice | None,
    Unlisted,
    PlainValidator(_chat_choice),
    WithJsonSchema({"anyOf": [_MODES, _NAMED, {"type": "null"}]}),
]


class Function(StrictModel):
    """A function that the model may call."""

    name: FunctionName = Field(description="The name that the model calls.")
    description: Text | None = Field(
        None, description="For the model: what it does, and when to call it."
    )
    parameters: Parameters = Field(
        None, description="The JSON schema of its arguments (an object). Default: no arguments."
    )
    strict: bool | None = Field(
        None,
        description="Reject a schema that cannot be enforced exactly. Default false: parts that "
        "cannot be enforced are left to the model.",
    )

    def definition(self) -> FunctionDefinition:
        return FunctionDefinition(
            name=self.name,
            description=self.description,
            parameters=self.parameters,
            strict=self.strict or False,
        )


class FunctionTool(StrictModel):
    """A tool. Functions are the only type."""

    type: Literal["function"] = Field(description="The type of the tool.")
    function: Function = Field(description="The function.")


class CalledFunction(StrictModel):
    """The function that was called, and its arguments."""

    name: FunctionName = Field(description="The function.")
    arguments: Arguments = Field(description="A JSON object as text.")


class CalledTool(StrictModel):
    """A call in an earlier message of the assistant."""

    id: Label = Field(description="The id that the message with the result refers to.")
    type: Literal["function"] | None = Field(None, description="The type of the tool.")
    function: CalledFunction = Field(description="The call.")
    index: int | None = Field(
        None, ge=0, lt=MAX_TOOLS, description="Accepted for compatibility; has no effect."
    )

    def call(self) -> ToolCall:
        return ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


Tools = Annotated[list[FunctionTool] | None, Field(max_length=MAX_TOOLS)]
CalledTools = Annotated[list[CalledTool] | None, Field(max_length=MAX_TOOLS)]
