"""The tools of POST /v1/responses: functions and custom tools of the client's, and tools that this
server lacks.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from service.api.fields import FieldError, StrictModel, Text
from service.api.tools.chat import FunctionDefinition, InputFormat, Mode, ToolChoice, ToolRef
from service.api.tools.schema import (
    Function,
    FunctionName,
    choice_schema,
    parsed_by,
    read_tool_choice,
)

_HOSTED = (
    "apply_patch|code_interpreter|computer|computer_use|computer_use_preview|file_search"
    "|image_generation|local_shell|mcp|namespace|programmatic_tool_calling|shell|tool_search"
    "|web_search|web_search_preview"
)
HOSTED = re.compile(rf"({_HOSTED})(_[0-9]{{4}}(_[0-9]{{2}}){{2}})?")
"""Types of OpenAI's own tools, also with a date."""


class _FunctionType(StrictModel):
    type: Literal["function"] = Field(description="The kind of tool.")


class ResponseTool(Function, _FunctionType):  # in this order `type` is the first field
    """A function that the model may call."""

    def echoed(self) -> dict[str, Any]:
        return self.model_dump() | {"strict": self.strict or False}


class CustomFormat(StrictModel):
    """What the input of a custom tool must match."""

    type: Literal["text", "grammar"] = Field(description="Any text, or what a grammar describes.")
    syntax: Literal["lark", "regex"] | None = Field(
        None, description="The notation of the grammar; required with it."
    )
    definition: Text | None = Field(
        None, validate_default=True, description="The grammar; required with the type grammar."
    )

    @field_validator("definition")
    @classmethod
    def _only_with_its_type(cls, value: str | None, info: ValidationInfo) -> str | None:
        given = [value is not None, info.data.get("syntax") is not None]
        if given != [info.data.get("type") == "grammar"] * 2:
            message = "and syntax must be given with the type grammar, and only then"
            raise FieldError("invalid_value", message)
        return value


class ResponseCustomTool(StrictModel):
    """A tool that takes a text."""

    type: Literal["custom"] = Field(description="The kind of tool.")
    name: FunctionName = Field(description="The name that the model calls.")
    description: Text | None = Field(
        None, description="For the model: what it does, and when to call it."
    )
    format: CustomFormat | None = Field(
        None, description="What the input must match. Default: any text."
    )

    def definition(self) -> FunctionDefinition:
        form, given = self.format, None
        if form is not None and form.syntax is not None:
            given = InputFormat(syntax=form.syntax, definition=form.definition or "")
        return FunctionDefinition(
            name=self.name, description=self.description, custom=True, input_format=given
        )

    def echoed(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class HostedTool(StrictModel):
    """A tool that OpenAI's servers run. This one has none of them: it is dropped, and the header
    x-quire-warning of the answer names it.
    """

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, WithJsonSchema({"type": "string", "pattern": f"^({HOSTED.pattern})$"})] = (
        Field(description="The kind of tool.")
    )

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if not HOSTED.fullmatch(value):
            raise FieldError(
                "invalid_value", "must be function, custom or one of OpenAI's hosted tools"
            )
        return value


def _kind_of_tool(tool: object) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind == "custom":
        return "(custom)"
    return "(hosted)" if isinstance(kind, str) and kind != "function" else "(function)"


AnyTool = Annotated[
    Annotated[ResponseTool, Tag("(function)")]
    | Annotated[ResponseCustomTool, Tag("(custom)")]
    | Annotated[HostedTool, Tag("(hosted)")],
    Discriminator(_kind_of_tool),
]


def _tool_choice(value: object) -> ToolChoice | None:
    return None if value is None else read_tool_choice(value, nested=False)


Choice = Annotated[
    ToolChoice | None,
    parsed_by(_tool_choice),
    WithJsonSchema(choice_schema(nested=False)),
]


def echoed_choice(choice: ToolChoice | None) -> str | dict[str, Any]:
    """The choice as a response repeats it."""
    if choice is None:
        return Mode.AUTO.value
    if choice.tool is not None:
        return _echoed_ref(choice.tool)
    if choice.allowed is None:
        return choice.mode.value
    tools = [_echoed_ref(tool) for tool in choice.allowed]
    return {"type": "allowed_tools", "mode": choice.mode.value, "tools": tools}


def _echoed_ref(tool: ToolRef) -> dict[str, str]:
    return {"type": "custom" if tool.custom else "function", "name": tool.name}
