"""Messages and tools in bodies: functions, custom tools, earlier calls, and the tool choice.

Each field is checked by itself; `tool_use` checks fields that depend on each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    GetPydanticSchema,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import core_schema

from service.api.http.fields import (
    MAX_ITEMS,
    Content,
    FieldError,
    Label,
    NoEffect,
    Text,
    check_json,
)
from service.api.http.models import MessageModel, StrictModel
from service.api.tools.chat import (
    ChatMessage,
    FunctionDefinition,
    InputFormat,
    Mode,
    ToolCall,
    ToolChoice,
    ToolRef,
)
from service.api.tools.parser import MAX_NAME

MAX_TOOLS = 128
_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_NAME}}}")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        message = f"must be 1 to {MAX_NAME} letters, digits, underscores or dashes"
        raise FieldError("invalid_value", message)
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


def read_tool_choice(value: object, *, nested: bool) -> ToolChoice:
    """Parses a mode, or an object that names one tool or the allowed ones. `nested`: as in chats,
    the content of the object is below the name of its type.
    """
    if isinstance(value, str):
        return ToolChoice(_mode(value, set(Mode)))
    if not isinstance(value, dict):
        raise FieldError("invalid_type", "must be a string or an object")
    if value.get("type") != "allowed_tools":
        return ToolChoice(Mode.REQUIRED, _tool_ref(value, nested=nested))
    fields = _content(value, nested=nested)
    if set(fields) != {"mode", "tools"}:
        raise FieldError("invalid_value", "allowed_tools must hold mode and tools")
    mode = _mode(fields["mode"], {Mode.AUTO, Mode.REQUIRED})
    tools = fields["tools"]
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise FieldError("invalid_value", f"must allow a list of 1 to {MAX_TOOLS} tools")
    return ToolChoice(mode, allowed=tuple(_tool_ref(tool, nested=nested) for tool in tools))


def _mode(value: object, modes: Collection[Mode]) -> Mode:
    if not isinstance(value, str) or value not in modes:
        names = ", ".join(mode for mode in Mode if mode in modes)
        raise FieldError("invalid_value", f"must be one of {names}, or name a tool")
    return Mode(value)


def _tool_ref(value: object, *, nested: bool) -> ToolRef:
    if not isinstance(value, dict) or value.get("type") not in ("function", "custom"):
        message = 'can only name tools of the types "function" and "custom"'
        raise FieldError("invalid_value", message)
    fields = _content(value, nested=nested)
    if set(fields) != {"name"}:
        raise FieldError("invalid_value", "must hold the name of a tool and nothing else")
    if not isinstance(fields["name"], str):
        raise FieldError("invalid_type", "must name a tool by a string")
    return ToolRef(_name(fields["name"]), custom=value["type"] == "custom")


def _content(value: dict[str, Any], *, nested: bool) -> dict[str, Any]:
    if not nested:
        return {key: item for key, item in value.items() if key != "type"}
    content = value.get(value["type"])
    if not isinstance(content, dict) or len(value) != 2:
        raise FieldError("invalid_value", "must hold its type, and an object of that name")
    return content


def choice_schema(*, nested: bool) -> dict[str, Any]:
    """The JSON schema of what `read_tool_choice` accepts, and of null."""
    name = {"name": {"type": "string", "pattern": f"^{_NAME.pattern}$"}}
    tools = [_object(kind, name, nested=nested) for kind in ("function", "custom")]
    allowed: dict[str, Any] = {
        "mode": {"type": "string", "enum": [Mode.AUTO.value, Mode.REQUIRED.value]},
        "tools": {"type": "array", "minItems": 1, "maxItems": MAX_TOOLS,
                  "items": {"anyOf": tools}},
    }  # fmt: skip
    modes = {"type": "string", "enum": [mode.value for mode in Mode]}
    some = _object("allowed_tools", allowed, nested=nested)
    return {"anyOf": [modes, *tools, some, {"type": "null"}]}


def _object(kind: str, fields: dict[str, Any], *, nested: bool) -> dict[str, Any]:
    def closed(properties: dict[str, Any]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    tag = {"type": {"type": "string", "enum": [kind]}}
    return closed(tag | ({kind: closed(fields)} if nested else fields))


def _chat_choice(value: object) -> ToolChoice | None:
    return None if value is None else read_tool_choice(value, nested=True)


FunctionName = Annotated[
    str,
    AfterValidator(_name),
    WithJsonSchema({"type": "string", "pattern": f"^{_NAME.pattern}$"}),
]
Parameters = Annotated[dict[str, Any] | None, BeforeValidator(_parameters)]
CallIndex = Annotated[
    int | None,
    Field(ge=0, lt=MAX_TOOLS, description="Accepted for compatibility; has no effect."),
]


def parsed_by(parse: Callable[[Any], object]) -> GetPydanticSchema:
    """Validates by a function alone. Unlike with a PlainValidator, what it returns is not listed
    among the schemas of the OpenAPI document.
    """
    schema = core_schema.no_info_plain_validator_function(parse)
    return GetPydanticSchema(lambda _source, _handler: schema)


ChatToolChoice = Annotated[
    ToolChoice | None,
    parsed_by(_chat_choice),
    WithJsonSchema(choice_schema(nested=True)),
]


class NamedTool(StrictModel):
    name: FunctionName = Field(description="The name that the model calls.")
    description: Text | None = Field(
        None, description="For the model: what it does, and when to call it."
    )


class Function(NamedTool):
    """A function that the model may call."""

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
    """A tool that takes arguments."""

    type: Literal["function"] = Field(description="The type of the tool.")
    function: Function = Field(description="The function.")

    def definition(self) -> FunctionDefinition:
        return self.function.definition()


class GrammarFields(StrictModel):
    """What the input of a custom tool must match."""

    syntax: Literal["lark", "regex"] = Field(description="The notation of the grammar.")
    definition: Text = Field(min_length=1, description="The grammar.")


class InputGrammar(StrictModel):
    """The format of a custom tool's input."""

    type: Literal["text", "grammar"] = Field(description="Any text, or what a grammar describes.")
    grammar: GrammarFields | None = Field(
        None, validate_default=True, description="Only with the type grammar."
    )

    @field_validator("grammar")
    @classmethod
    def _only_with_its_type(
        cls, value: GrammarFields | None, info: ValidationInfo
    ) -> GrammarFields | None:
        if (info.data.get("type") == "grammar") != (value is not None):
            raise FieldError("invalid_value", "must be given with the type grammar, and only then")
        return value


class CustomFields(NamedTool):
    """A tool that takes a text."""

    format: InputGrammar | None = Field(
        None, description="What the input must match. Default: any text."
    )


class ChatCustomTool(StrictModel):
    """A tool that takes a text."""

    type: Literal["custom"] = Field(description="The type of the tool.")
    custom: CustomFields = Field(description="The tool.")

    def definition(self) -> FunctionDefinition:
        tool, form = self.custom, self.custom.format
        grammar = None if form is None else form.grammar
        given = None
        if grammar is not None:
            given = InputFormat(syntax=grammar.syntax, definition=grammar.definition)
        return FunctionDefinition(
            name=tool.name, description=tool.description, custom=True, input_format=given
        )


class CalledFunction(StrictModel):
    """The function that was called, and its arguments."""

    name: FunctionName = Field(description="The function.")
    arguments: Text = Field(
        description="A JSON object as text. One that was cut off is accepted, too."
    )


class CalledTool(StrictModel):
    """A call in an earlier message of the assistant."""

    id: Label = Field(description="The id that the message with the result refers to.")
    type: Literal["function"] | None = Field(None, description="The type of the tool.")
    function: CalledFunction = Field(description="The call.")
    index: CallIndex = None

    def call(self) -> ToolCall:
        return ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


class CalledCustom(StrictModel):
    """The custom tool that was called, and its input."""

    name: FunctionName = Field(description="The tool.")
    input: Text = Field(description="Its input.")


class CalledCustomTool(StrictModel):
    """A call of a custom tool in an earlier message of the assistant."""

    id: Label = Field(description="The id that the message with the result refers to.")
    type: Literal["custom"] = Field(description="The type of the tool.")
    custom: CalledCustom = Field(description="The call.")
    index: CallIndex = None

    def call(self) -> ToolCall:
        called = self.custom
        return ToolCall(id=self.id, name=called.name, arguments=called.input, custom=True)


def _kind(value: object) -> str:
    """The tag of the type that a tool or a call is validated as."""
    custom = isinstance(value, dict) and value.get("type") == "custom"
    return "(custom)" if custom else "(function)"


_Tool = Annotated[
    Annotated[FunctionTool, Tag("(function)")] | Annotated[ChatCustomTool, Tag("(custom)")],
    Discriminator(_kind),
]
_Called = Annotated[
    Annotated[CalledTool, Tag("(function)")] | Annotated[CalledCustomTool, Tag("(custom)")],
    Discriminator(_kind),
]
Tools = Annotated[list[_Tool] | None, Field(max_length=MAX_TOOLS)]
CalledTools = Annotated[list[_Called] | None, Field(max_length=MAX_TOOLS)]


class Message(MessageModel):
    """One message of a chat. Accepts an assistant message as this server and others return it."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="The author of the message."
    )
    content: Content = Field(
        description="The text, or a list of text parts. The assistant's may be null or empty."
    )
    reasoning_content: Text | None = Field(
        None, description="The assistant's reasoning before the text, for the chat template."
    )
    reasoning: Text | None = Field(
        None, description="The same as `reasoning_content`, which takes precedence."
    )
    refusal: Text | None = Field(
        None, description="The assistant's text instead of the content, if it refused to answer."
    )
    provider_specific_fields: NoEffect = None
    annotations: Annotated[list[dict[str, Any]] | None, Field(max_length=MAX_ITEMS)] = Field(
        None, description="Citations of an earlier answer. Accepted; has no effect."
    )
    name: Label | None = Field(None, description="The author's name, for the chat template.")
    tool_calls: CalledTools = Field(None, description="The tool calls of the assistant.")
    tool_call_id: Label | None = Field(
        None, validate_default=True, description="The call that a message of a tool answers."
    )

    @field_validator("tool_calls", "reasoning_content", "reasoning", "refusal", "annotations")
    @classmethod
    def _needs_assistant(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401
        if value is not None and info.data.get("role", "assistant") != "assistant":
            raise FieldError("invalid_value", "needs the role assistant")
        return None if value == [] else value  # clients send an empty list of calls back

    @field_validator("tool_call_id")
    @classmethod
    def _needs_tool(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if role == "tool" and value is None:
            raise FieldError("missing_required_parameter", "is required with the role tool")
        if role != "tool" and value is not None:
            raise FieldError("invalid_value", "needs the role tool")
        return value

    def chat_message(self) -> ChatMessage:
        return ChatMessage(
            role=self.role,
            content=self.content or self.refusal or "",
            name=self.name,
            reasoning=self.reasoning_content or self.reasoning,
            tool_calls=tuple(called.call() for called in self.tool_calls or ()),
            tool_call_id=self.tool_call_id,
        )
