"""The tools of POST /v1/responses: functions of the client's, and tools that this server lacks."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    field_validator,
)

from service.api.fields import FieldError, StrictModel
from service.api.tools.chat import Mode, ToolChoice
from service.api.tools.schema import Function, Unlisted, read_tool_choice

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
            raise FieldError("invalid_value", "must be function, or one of OpenAI's hosted tools")
        return value


def _kind_of_tool(tool: object) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return "(hosted)" if isinstance(kind, str) and kind != "function" else "(function)"


AnyTool = Annotated[
    Annotated[ResponseTool, Tag("(function)")] | Annotated[HostedTool, Tag("(hosted)")],
    Discriminator(_kind_of_tool),
]


def _tool_choice(value: object) -> ToolChoice | None:
    return None if value is None else read_tool_choice(value, nested=False)


_NAMED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": ["function"]},
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
    },
    "required": ["type", "name"],
    "additionalProperties": False,
}
Choice = Annotated[
    ToolChoice | None,
    Unlisted,
    PlainValidator(_tool_choice),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "enum": [str(m) for m in Mode]}, _NAMED, {"type": "null"}]}
    ),
]


def echoed_choice(choice: ToolChoice | None) -> str | dict[str, str]:
    """The choice as a response repeats it."""
    if choice is None:
        return Mode.AUTO.value
    return choice.mode.value if choice.name is None else {"type": "function", "name": choice.name}
