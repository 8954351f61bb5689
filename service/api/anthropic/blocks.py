"""The messages of a body. The content of a message is a list of blocks:

    text                          all       text
    thinking, redacted_thinking   assistant its reasoning; the redacted kind has no effect
    tool_use                      assistant a tool call
    tool_result                   user      the result of a call

All other kinds are rejected by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from service.api.http.fields import CacheControl, FieldError, IgnoredText, Label, Text, check_json
from service.api.http.models import MessageModel, WireModel
from service.api.tools.schema import FunctionName

MAX_BLOCKS = 1024  # of one message

_KINDS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
_READS_TEXT = "this server reads text only"
_NO_HOSTED_TOOLS = "this server runs no tools of its own"
_UNSUPPORTED: Mapping[str, str] = MappingProxyType({
    "image": _READS_TEXT,
    "document": f"{_READS_TEXT}; send it as a text block",
    "search_result": f"{_READS_TEXT}; send it as a text block",
    "container_upload": "this server has no containers",
    "compaction": "this server does not compact chats",
    "server_tool_use": _NO_HOSTED_TOOLS,
    "web_search_tool_result": _NO_HOSTED_TOOLS,
    "web_fetch_tool_result": _NO_HOSTED_TOOLS,
    "code_execution_tool_result": _NO_HOSTED_TOOLS,
    "tool_reference": "this server sends all tools to the model",
    "mcp_tool_use": "this server connects to no MCP servers",
    "mcp_tool_result": "this server connects to no MCP servers",
})  # fmt: skip


def _blocks(value: object, *, kinds: tuple[str, ...]) -> object:
    """A string is one text block. The error for another kind names the supported ones."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise FieldError("invalid_type", "must be a string or a list of blocks")
    if len(value) > MAX_BLOCKS:  # before any of them is validated
        raise FieldError("array_above_max_length", f"may have at most {MAX_BLOCKS} blocks")
    for block in value:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in kinds:
            reason = _UNSUPPORTED.get(kind) if isinstance(kind, str) else None
            refused = "" if reason is None else f" ({kind} is not: {reason})"
            message = f"only blocks of the type {', '.join(kinds)} are supported{refused}"
            raise FieldError("unsupported_content", message)
    return value


class ContentBlock(WireModel):
    """The fields that all blocks have."""

    unsupported = MappingProxyType({
        "citations": ([],), "caller": ({"type": "direct"},), "toolset_name": (),
    })  # fmt: skip

    cache_control: CacheControl = None


class TextBlock(ContentBlock):
    """A part of a message's text."""

    type: Literal["text"] = Field(description="The kind of block.")
    text: Text = Field(description="The text.")


TextBlocks = Annotated[
    list[TextBlock],
    BeforeValidator(
        partial(_blocks, kinds=("text",)), json_schema_input_type=str | list[TextBlock]
    ),
]


class ToolUseBlock(ContentBlock):
    """A tool call that the assistant made."""

    type: Literal["tool_use"] = Field(description="The kind of block.")
    id: Label = Field(description="The id that the result refers to.")
    name: FunctionName = Field(description="The tool.")
    input: dict[str, Any] = Field(description="The arguments.")

    @field_validator("input")
    @classmethod
    def _is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_json(value)
        return value


class ThinkingBlock(ContentBlock):
    """The assistant's reasoning."""

    type: Literal["thinking"] = Field(description="The kind of block.")
    thinking: Text = Field(description="The reasoning, for the chat template.")
    signature: IgnoredText = None


class RedactedThinkingBlock(ContentBlock):
    """Reasoning that only the server that wrote it can read; it has no effect."""

    type: Literal["redacted_thinking"] = Field(description="The kind of block.")
    data: IgnoredText = None


class ToolResultBlock(ContentBlock):
    """The result of a tool call."""

    type: Literal["tool_result"] = Field(description="The kind of block.")
    tool_use_id: Label = Field(description="The id of the call.")
    content: TextBlocks = Field([], description="The result: a text, or text blocks.")
    is_error: bool | None = Field(
        None, description="Whether the call failed. The model reads the content only."
    )


TurnBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]
_NOT_ALLOWED: Mapping[str, tuple[type[ContentBlock], ...]] = {
    "user": (ToolUseBlock, ThinkingBlock, RedactedThinkingBlock),
    "assistant": (ToolResultBlock,),
    "system": (ToolUseBlock, ThinkingBlock, RedactedThinkingBlock, ToolResultBlock),
}


class Turn(MessageModel):
    """One message of the chat so far."""

    unsupported = MappingProxyType({"output_config": ({},)})

    role: Literal["system", "user", "assistant"] = Field(
        description="The author of the message. A system message may be anywhere."
    )
    content: Annotated[
        list[TurnBlock],
        BeforeValidator(
            partial(_blocks, kinds=_KINDS), json_schema_input_type=str | list[TurnBlock]
        ),
    ] = Field(description="The text, or a list of blocks. The assistant's may be null.")
    clear_at: Literal["next_user_message", "never"] | None = Field(
        None, description="With next_user_message, a later message of the user hides this one."
    )

    @field_validator("content")
    @classmethod
    def _fits_the_role(cls, value: list[TurnBlock], info: ValidationInfo) -> list[TurnBlock]:
        not_allowed = _NOT_ALLOWED.get(info.data.get("role", ""), ())
        if any(isinstance(block, not_allowed) for block in value):
            raise FieldError(
                "invalid_value",
                "may contain tool_use and thinking only for the assistant, "
                "tool_result only for the user",
            )
        return value

    @field_validator("clear_at")
    @classmethod
    def _needs_system(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("role", "system") != "system":
            raise FieldError("invalid_value", "needs the role system")
        return value
