"""A chat and its tools in no dialect's terms: messages, tools, and which of them to call.

A *custom* tool takes a text, its input, instead of arguments. The model sees it as a function with
one parameter, `input`, and the parser of its calls returns the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from service.api.fields import FieldNames
from service.errors import BadRequest

Role = Literal["system", "developer", "user", "assistant", "tool"]


INPUT = "input"  # the parameter of a custom tool


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call in an earlier message of the assistant."""

    id: str  # the message with the result names it
    name: str
    arguments: str  # the text of a JSON object, also incomplete; of a custom tool: its input
    custom: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message, as the chat template gets it."""

    role: Role
    content: str
    name: str | None = None
    reasoning: str | None = None  # of the assistant, before the text
    tool_calls: tuple[ToolCall, ...] = ()  # of the assistant
    tool_call_id: str | None = None  # of a tool's message: the call that it answers


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFormat:
    """What the input of a custom tool must match."""

    syntax: Literal["lark", "regex"]
    definition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionDefinition:
    """A function or a custom tool that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema of an object; None: no arguments
    strict: bool = False  # an inexpressible schema is an error
    custom: bool = False  # takes a text; `parameters` and `strict` do not apply
    input_format: InputFormat | None = None  # of a custom tool; None: any text

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the arguments, as the model sees it."""
        if self.custom:
            text = {"type": "string"}
            return {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
        return self.parameters or {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of a chat whose `tool_choice` is not "none"."""

    functions: tuple[FunctionDefinition, ...]  # described in the prompt
    may_call: tuple[int, ...]  # indices of those that the model may call
    forced: bool  # the output must be calls, without other text
    parallel: bool  # several calls are allowed; false if the choice names one tool


class Mode(StrEnum):
    """Whether the model calls functions."""

    NONE = "none"
    AUTO = "auto"  # the model decides
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolRef:
    """A tool that a choice names."""

    name: str
    custom: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`tool_choice`: a mode, and the tools that it is about."""

    mode: Mode
    tool: ToolRef | None = None  # the one tool that must be called, once
    allowed: tuple[ToolRef, ...] | None = None  # those that may be called; None: all


def tool_use(
    functions: Sequence[FunctionDefinition],
    *,
    choice: ToolChoice | None,
    parallel: bool,
    names: FieldNames,
) -> ToolUse | None:
    """Returns None if the output is text only. Raises BadRequest."""
    if not functions:
        if choice is not None and choice.mode is not Mode.NONE:
            raise BadRequest("tool_choice needs tools", param="tool_choice")
        return None
    choice = choice or ToolChoice(Mode.AUTO)
    tools = [ToolRef(function.name, function.custom) for function in functions]
    for index, tool in enumerate(tools):
        if any(tool.name == earlier.name for earlier in tools[:index]):
            param = f"{names.function.format(index)}.name"
            raise BadRequest("tool names must be unique", param=param)
    allowed = choice.allowed if choice.tool is None else (choice.tool,)
    if allowed is not None and not set(allowed) <= set(tools):
        raise BadRequest("tool_choice names a tool that is not in tools", param="tool_choice")
    if choice.mode is Mode.NONE:
        return None
    return ToolUse(
        functions=tuple(functions),
        may_call=tuple(i for i, tool in enumerate(tools) if allowed is None or tool in allowed),
        forced=choice.mode is Mode.REQUIRED,
        parallel=parallel and choice.tool is None,
    )
