"""A chat and its tools in no dialect's terms: messages, functions, and which of them to call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from service.api.fields import FieldNames
from service.errors import BadRequest

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call in an earlier message of the assistant."""

    id: str  # the message with the result names it
    name: str
    arguments: str  # the text of a JSON object


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
class FunctionDefinition:
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema of an object; None: no arguments
    strict: bool = False  # an inexpressible schema is an error


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of a chat whose `tool_choice` is not "none"."""

    functions: tuple[FunctionDefinition, ...]  # described in the prompt
    may_call: tuple[int, ...]  # indices of those that the model may call
    forced: bool  # the output must be calls, without other text
    parallel: bool  # several calls are allowed; false if the choice names one function


class Mode(StrEnum):
    """Whether the model calls functions."""

    NONE = "none"
    AUTO = "auto"  # the model decides
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`tool_choice`: a mode, or the one function that must be called."""

    mode: Mode
    name: str | None = None


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
    tools = [function.name for function in functions]
    for index, name in enumerate(tools):
        if name in tools[:index]:
            param = f"{names.function.format(index)}.name"
            raise BadRequest("tool names must be unique", param=param)
    if choice.name is not None and choice.name not in tools:
        raise BadRequest("tool_choice names a function that is not in tools", param="tool_choice")
    if choice.mode is Mode.NONE:
        return None
    return ToolUse(
        functions=tuple(functions),
        may_call=tuple(i for i, name in enumerate(tools) if choice.name in {None, name}),
        forced=choice.mode is Mode.REQUIRED,
        parallel=parallel and choice.name is None,
    )
