"""The items and the tools of POST /v1/responses.

Input items are messages, calls, results, reasoning and references; the items of an earlier
response's output are valid input items, too. Tools are functions and custom tools of the client's,
and tools that this server lacks.
"""

from __future__ import annotations

import base64
import binascii
import re
from types import MappingProxyType
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

from service.api.http.fields import FieldError, Ignored, Label, ResponseContent, Text
from service.api.http.models import MAX_MESSAGES, UNSUPPORTED, MessageModel, StrictModel, WireModel
from service.api.tools.chat import (
    FunctionDefinition,
    InputFormat,
    Mode,
    ToolCall,
    ToolChoice,
    ToolRef,
)
from service.api.tools.schema import (
    Function,
    FunctionName,
    NamedTool,
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


class ResponseTool(Function, _FunctionType):  # in this order, `type` is the first field
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


class _CustomType(StrictModel):
    type: Literal["custom"] = Field(description="The kind of tool.")


class ResponseCustomTool(NamedTool, _CustomType):
    """A tool that takes a text."""

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


SEALED = "quire1."
"""Begins the `encrypted_content` that this server makes: the reasoning in base64url follows."""


def seal(text: str) -> str:
    """The reasoning as opaque text that a client can send back: encoded, not encrypted."""
    return SEALED + base64.urlsafe_b64encode(text.encode()).decode()


def unseal(sealed: str) -> str | None:
    """The reasoning in an `encrypted_content`; None if another server made it."""
    if not sealed.startswith(SEALED):
        return None
    try:
        return base64.b64decode(sealed[len(SEALED) :], altchars="-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None


class InputMessage(MessageModel):
    """A message, also one of an earlier response's output."""

    unsupported = MappingProxyType({**UNSUPPORTED, "tool_calls": ([],)})

    type: Literal["message"] | None = Field(None, description="The kind of item.")
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="The author of the message."
    )
    content: ResponseContent = Field(
        description="The text, or a list of text parts. The assistant's may be null or empty."
    )
    reasoning_content: Text | None = Field(
        None, description="The assistant's reasoning before the text, for the chat template."
    )
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None

    @field_validator("reasoning_content")
    @classmethod
    def _only_of_the_assistant(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("role", "assistant") != "assistant":
            raise FieldError("invalid_value", "needs the role assistant")
        return value


class ReasoningPart(WireModel):
    """A part of a reasoning item."""

    type: Literal["reasoning_text", "summary_text"] = Field(description="The kind of part.")
    text: Text = Field(description="The text.")


_Parts = Annotated[list[ReasoningPart] | None, Field(max_length=MAX_MESSAGES)]


class InputReasoning(WireModel):
    """The assistant's reasoning before its next message or call."""

    type: Literal["reasoning"] = Field(description="The kind of item.")
    summary: _Parts = Field(None, description="Used if there is nothing else.")
    content: _Parts = Field(None, description="The reasoning, for the chat template.")
    encrypted_content: Text | None = Field(
        None,
        description="The reasoning as this server returned it, used if there is no content. That "
        "of other servers is not readable and has no effect.",
    )
    id: Ignored = None
    status: Ignored = None

    @property
    def text(self) -> str | None:
        """The reasoning; None if it has no text."""
        if not self.content and (text := unseal(self.encrypted_content or "")):
            return text
        return "".join(part.text for part in self.content or self.summary or ()) or None


class InputCall(StrictModel):
    """A tool call of an earlier response."""

    type: Literal["function_call"] = Field(description="The kind of item.")
    call_id: Label = Field(description="The id that the item with the result refers to.")
    name: FunctionName = Field(description="The function.")
    arguments: Text = Field(
        description="The text of a JSON object. One that was cut off is accepted, too."
    )
    id: Ignored = None
    status: Ignored = None

    def call(self) -> ToolCall:
        return ToolCall(id=self.call_id, name=self.name, arguments=self.arguments)


class InputResult(StrictModel):
    """The result of a tool call."""

    type: Literal["function_call_output", "custom_tool_call_output"] = Field(
        description="The kind of item."
    )
    call_id: Label = Field(description="The id of the call.")
    output: ResponseContent = Field(description="The text, or a list of text parts.")
    id: Ignored = None
    status: Ignored = None


class InputCustomCall(StrictModel):
    """A call of a custom tool in an earlier response."""

    type: Literal["custom_tool_call"] = Field(description="The kind of item.")
    call_id: Label = Field(description="The id that the item with the result refers to.")
    name: FunctionName = Field(description="The tool.")
    input: Text = Field(description="Its input.")
    id: Ignored = None
    status: Ignored = None

    def call(self) -> ToolCall:
        return ToolCall(id=self.call_id, name=self.name, arguments=self.input, custom=True)


class InputReference(StrictModel):
    """An item of a stored response, input or output, by its id."""

    type: Literal["item_reference"] | None = Field(None, description="The kind of item.")
    id: Label = Field(description="The id of the item.")


RESULTS = ("function_call_output", "custom_tool_call_output")
_KINDS = ("function_call", "custom_tool_call", "reasoning", "item_reference")


def _kind_of_item(item: object) -> str:
    """The tag of the type that an item is validated as."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind is None and isinstance(item, dict) and set(item) - {"type"} == {"id"}:
        kind = "item_reference"  # its type is optional
    if kind in RESULTS:
        return "(result)"
    return f"({kind})" if kind in _KINDS else "(message)"


AnyCall = InputCall | InputCustomCall
InputItem = InputMessage | InputReasoning | AnyCall | InputResult
"""An item that is no reference."""
AnyItem = Annotated[
    Annotated[InputMessage, Tag("(message)")]
    | Annotated[InputReasoning, Tag("(reasoning)")]
    | Annotated[InputCall, Tag("(function_call)")]
    | Annotated[InputResult, Tag("(result)")]
    | Annotated[InputCustomCall, Tag("(custom_tool_call)")]
    | Annotated[InputReference, Tag("(item_reference)")],
    Discriminator(_kind_of_item),
]


_PREFIXES = {
    "message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco",
    "custom_tool_call": "ctc", "custom_tool_call_output": "ctco",
}  # fmt: skip


def stored_item(item: InputItem, id_: str) -> dict[str, Any]:
    """An item as it is stored, listed, and read again: with all fields of a returned item."""
    fields: dict[str, Any] = {"status": "completed"}
    if isinstance(item, InputMessage):
        kind = "output_text" if item.role == "assistant" else "input_text"
        part: dict[str, Any] = {"type": kind, "text": item.content}
        if item.role == "assistant":
            part["annotations"] = []
            if item.reasoning_content is not None:
                fields["reasoning_content"] = item.reasoning_content
        fields |= {"type": "message", "role": item.role, "content": [part]}
    elif isinstance(item, InputReasoning):
        parts = [] if item.text is None else [{"type": "reasoning_text", "text": item.text}]
        fields |= {"type": "reasoning", "summary": [], "content": parts}
    else:
        fields |= item.model_dump(exclude={"id", "status"})
    return {"id": f"{_PREFIXES[fields['type']]}_{id_}", **fields}
