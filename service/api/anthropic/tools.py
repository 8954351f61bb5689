"""The tools of a body: the client's own, and those that Anthropic defines.

custom                              a name, a description and a schema
bash_*, text_editor_*, memory_*     executed by the client: their schemas are here
web_search_*, code_execution_*, ... executed by Anthropic's servers: left out, with a warning
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from service.api.http.fields import CacheControl, FieldError, Text, check_json
from service.api.http.models import StrictModel, WireModel
from service.api.tools.chat import FunctionDefinition
from service.api.tools.schema import FunctionName, Parameters

MAX_EXAMPLES = 16  # of one tool

_HOSTED = r"^(web_search|web_fetch|code_execution|advisor|tool_search_tool_(bm25|regex))(_\d{8})?$"
_HOSTED_TYPE = re.compile(_HOSTED)


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def _object(*required: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


_EDITS: dict[str, dict[str, Any]] = {
    "path": _text("Absolute path of a file or a directory."),
    "view_range": {
        "type": "array",
        "items": {"type": "integer"},
        "description": "For view: first and last line, from 1; -1 is the end of the file.",
    },
    "file_text": _text("For create: the content of the file."),
    "old_str": _text("For str_replace: the text to replace. It must occur exactly once."),
    "new_str": _text("For str_replace: the new text."),
    "insert_line": {
        "type": "integer",
        "description": "For insert: the line after which the text is inserted; 0 is the start.",
    },
    "insert_text": _text("For insert: the text."),
}


def _commands(*names: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(names), "description": "What to do."}


_BASH = FunctionDefinition(
    name="bash",
    description="Runs a command in a bash session, which persists between calls.",
    parameters=_object(
        command=_text("The command. Required unless restart is true."),
        restart={"type": "boolean", "description": "Restart the session."},
    ),
)
_EDITOR = FunctionDefinition(
    name="str_replace_based_edit_tool",
    description="Views, creates and edits text files.",
    parameters=_object(
        "command",
        "path",
        command=_commands("view", "create", "str_replace", "insert"),
        **_EDITS,
    ),
)
_OLD_EDITS = {name: field for name, field in _EDITS.items() if name != "insert_text"} | {
    "new_str": _text("For str_replace and insert: the new text."),
}
_OLD_EDITOR = FunctionDefinition(
    name="str_replace_editor",
    description=_EDITOR.description,
    parameters=_object(
        "command",
        "path",
        command=_commands("view", "create", "str_replace", "insert", "undo_edit"),
        **_OLD_EDITS,
    ),
)
_MEMORY = FunctionDefinition(
    name="memory",
    description="Reads and writes files below /memories, which persist between chats.",
    parameters=_object(
        "command",
        command=_commands("view", "create", "str_replace", "insert", "delete", "rename"),
        **_EDITS,
        old_path=_text("For rename: the present path."),
        new_path=_text("For rename: the new path."),
    ),
)
CLIENT_TOOLS: Mapping[str, FunctionDefinition] = MappingProxyType({
    "bash_20241022": _BASH,
    "bash_20250124": _BASH,
    "text_editor_20241022": _OLD_EDITOR,
    "text_editor_20250124": _OLD_EDITOR,
    "text_editor_20250429": _EDITOR,
    "text_editor_20250728": _EDITOR,
    "memory_20250818": _MEMORY,
})  # fmt: skip


class _OfferedTool(WireModel):
    """The fields that the client's own tools and those of `CLIENT_TOOLS` share."""

    unsupported = MappingProxyType({
        "allowed_callers": (["direct"],), "defer_loading": (False, True),
        "eager_input_streaming": (False, True),
    })  # fmt: skip

    name: FunctionName = Field(description="The name that the model calls it by.")
    strict: bool | None = Field(
        None, description="Reject a schema that cannot be enforced exactly. Default false."
    )
    input_examples: list[dict[str, Any]] | None = Field(
        None, max_length=MAX_EXAMPLES, description="Examples of its input, for the model."
    )
    cache_control: CacheControl = None

    @field_validator("input_examples")
    @classmethod
    def _is_json(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        check_json(value)
        return value

    def _completed(self, function: FunctionDefinition) -> FunctionDefinition:
        """Examples are an annotation of the schema, which the prompt contains."""
        parameters = function.parameters
        if self.input_examples:
            parameters = (parameters or {"type": "object"}) | {"examples": self.input_examples}
        return replace(function, name=self.name, parameters=parameters, strict=self.strict or False)


class CustomTool(_OfferedTool):
    """A tool of the client."""

    type: Literal["custom"] | None = Field(None, description="The kind of tool.")
    description: Text | None = Field(
        None, description="For the model: what the tool does, and when to call it."
    )
    input_schema: Parameters = Field(description="The JSON schema of its input, an object.")

    def definition(self) -> FunctionDefinition:
        """The function that the model may call."""
        return self._completed(
            FunctionDefinition(
                name=self.name, description=self.description, parameters=self.input_schema
            )
        )


class ClientTool(_OfferedTool):
    """A tool that Anthropic defines and the client executes."""

    type: Literal[
        "bash_20241022", "bash_20250124", "text_editor_20241022", "text_editor_20250124",
        "text_editor_20250429", "text_editor_20250728", "memory_20250818",
    ] = Field(description="The kind of tool, which implies its schema.")  # fmt: skip
    max_characters: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description="For the client, which cuts the files that it returns.",
    )

    def definition(self) -> FunctionDefinition:
        """The function that the model may call."""
        return self._completed(CLIENT_TOOLS[self.type])


class HostedTool(BaseModel):
    """A tool that Anthropic's servers execute. It is left out, whatever its options are."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: str = Field(pattern=_HOSTED, description="The kind of tool.")


def _kind(value: object) -> str | None:
    """The parentheses keep the kind out of the paths in error messages."""
    given = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if given is None or given == "custom":
        return "(custom)"
    if not isinstance(given, str):
        return None
    if _HOSTED_TYPE.match(given):
        return "(hosted)"
    return "(client)" if given in CLIENT_TOOLS else None


MessageTool = Annotated[
    Annotated[CustomTool, Tag("(custom)")]
    | Annotated[ClientTool, Tag("(client)")]
    | Annotated[HostedTool, Tag("(hosted)")],
    Discriminator(
        _kind,
        custom_error_type="unsupported_tool",
        custom_error_message="only tools of the client are supported: custom, bash_*, "
        "text_editor_*, memory_*",
    ),
]


class MessageToolChoice(StrictModel):
    """Whether the model calls tools, and which."""

    type: Literal["auto", "any", "tool", "none"] = Field(
        description="auto: the model decides; any: at least one call; tool: the named one; none."
    )
    name: FunctionName | None = Field(
        None, validate_default=True, description="The tool, with the type tool."
    )
    disable_parallel_tool_use: bool | None = Field(None, description="At most one call.")

    @field_validator("name")
    @classmethod
    def _only_with_the_type_tool(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (info.data.get("type") == "tool") != (value is not None):
            raise FieldError("invalid_value", "must be given with the type tool, and only then")
        return value
