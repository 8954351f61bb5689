"""A chat and its tools in no dialect's terms: messages, functions, and which of them to call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
