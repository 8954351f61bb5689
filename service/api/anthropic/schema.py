"""The bodies of POST /v1/messages and /v1/messages/count_tokens.

The content of a message is a list of blocks:

    text                          both      text
    thinking, redacted_thinking   assistant its reasoning; the redacted kind has no effect
    tool_use                      assistant a tool call
    tool_result                   user      the result of a call

What this server does not support is refused by name: see `WireModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from service.api.answers import AnswerModel, Assistant, CallId, Count, ModelId
from service.api.fields import (
    CacheControl,
    FieldError,
    Ignored,
    IgnoredText,
    Label,
    ModelName,
    OnDisconnect,
    Priority,
    Seed,
    StopStrings,
    StrictModel,
    Text,
    TopP,
    UnitTemperature,
    check_json,
)
from service.api.tools.schema import MAX_TOOLS, FunctionName, Parameters
from service.api.wire import MAX_MESSAGES, MAX_TOP_K, MessageModel, WireModel

MAX_BLOCKS = 1024  # of one message

_KINDS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
_SHARED: Mapping[str, tuple[Any, ...]] = {
    "thinking": ({"type": "disabled"},),
    "output_format": (),
    "speed": ("standard",),
    "context_management": (),
    "mcp_servers": ([],),
    "user_profile_id": (),
    "workspace_id": (),
}


def _blocks(value: object, *, kinds: tuple[str, ...]) -> object:
    """A string is one text block. The error for an unknown kind names the supported ones."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise FieldError("invalid_type", "must be a string or a list of blocks")
    if len(value) > MAX_BLOCKS:  # before any of them is validated
        raise FieldError("array_above_max_length", f"may have at most {MAX_BLOCKS} blocks")
    if any(not isinstance(block, dict) or block.get("type") not in kinds for block in value):
        names = ", ".join(kinds)
        raise FieldError("unsupported_content", f"only blocks of the type {names} are supported")
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
}


class Turn(MessageModel):
    """One message of the chat so far."""

    role: Literal["user", "assistant"] = Field(description="The author of the message.")
    content: Annotated[
        list[TurnBlock],
        BeforeValidator(
            partial(_blocks, kinds=_KINDS), json_schema_input_type=str | list[TurnBlock]
        ),
    ] = Field(description="The text, or a list of blocks. The assistant's may be null.")

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


class MessageTool(WireModel):
    """A tool that the model may call."""

    unsupported = MappingProxyType({
        "allowed_callers": (["direct"],), "defer_loading": (False,), "input_examples": ([],),
        "eager_input_streaming": (False, True),
    })  # fmt: skip

    type: Literal["custom"] | None = Field(None, description="Only the client's own tools.")
    name: FunctionName = Field(description="The name that the model calls it by.")
    description: Text | None = Field(
        None, description="For the model: what the tool does, and when to call it."
    )
    input_schema: Parameters = Field(description="The JSON schema of its input, an object.")
    strict: bool | None = Field(
        None, description="Reject a schema that cannot be enforced exactly. Default false."
    )
    cache_control: CacheControl = None


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


class OutputFormat(StrictModel):
    """The format of the text."""

    type: Literal["json_schema"] = Field(description="JSON that matches a schema.")
    schema_: dict[str, Any] = Field(alias="schema", description="The schema.")


class OutputConfig(WireModel):
    """Requirements on the answer."""

    unsupported = MappingProxyType({"effort": ()})

    format: OutputFormat | None = Field(
        None, description="The format of the text. Default: any text."
    )


class CountBody(WireModel):
    """The body of POST /v1/messages/count_tokens: the fields that the prompt is made of."""

    unsupported = _SHARED

    model: ModelName = Field(description="The id of the model, as /v1/models lists it.")
    messages: list[Turn] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The chat so far. If the last message is the assistant's, the answer continues "
        "it.",
    )
    system: TextBlocks | None = Field(None, description="The system prompt.")
    tools: list[MessageTool] | None = Field(
        None, max_length=MAX_TOOLS, description="Tools that the model may call."
    )
    tool_choice: MessageToolChoice | None = Field(
        None, description="Whether the model calls tools, and which. Default: auto."
    )
    output_config: OutputConfig | None = Field(None, description="Requirements on the answer.")
    cache_control: CacheControl = None


class MessageMetadata(WireModel):
    """Data about the call."""

    user_id: Ignored = None


class MessageBody(CountBody):
    """The body of POST /v1/messages."""

    unsupported = MappingProxyType({
        **_SHARED, "container": (), "diagnostics": (), "inference_geo": (),
        "service_tier": ("auto", "standard_only"),
    })  # fmt: skip

    max_tokens: int = Field(ge=1, description="Maximum number of output tokens.")
    temperature: UnitTemperature = Field(
        None, description="0 is greedy; 1 samples from the model's own distribution. Default 1."
    )
    top_p: TopP = Field(
        None, description="Sample from the most likely tokens that have this total probability."
    )
    top_k: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_K,
        description="Sample from the k most likely tokens only; 0: from all.",
    )
    stop_sequences: StopStrings = Field(
        None, description="Strings that end the answer; they are not part of it."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    metadata: MessageMetadata | None = Field(None, description="Data about the call.")
    seed: Seed = Field(
        None, description="The same seed gives the same answer. Default: a random one."
    )
    priority: Priority = None
    on_disconnect: OnDisconnect = None


class AnthropicMessage(AnswerModel):
    """An answer in the shape of Anthropic's API."""

    id: CallId
    type: Literal["message"] = Field(description="The type of this object.")
    role: Assistant
    model: ModelId
    content: list[dict[str, Any]] = Field(description="Text blocks and tool-use blocks.")
    stop_reason: str | None = Field(description="Why it ended.")
    usage: dict[str, Any] = Field(description="Token counts.")


class MessageCount(AnswerModel):
    """The length of a prompt."""

    input_tokens: Count = Field(description="Tokens of the whole prompt.")


class MessageErrorFields(AnswerModel):
    """What is wrong."""

    type: str = Field(description="The kind of error, as Anthropic names it.")
    message: str = Field(description="For people: what was wrong, and the limit.")
    code: str = Field("", description="Only `shutting_down`.")
    request_id: str = Field("", description="With it: the call to resume at another replica.")
    last_event_id: str = Field("", description="With it: the event to resume after.")


class MessageErrorBody(AnswerModel):
    """An error in the shape of Anthropic's API."""

    type: Literal["error"] = Field(description="Distinguishes errors from answers.")
    error: MessageErrorFields = Field(description="What is wrong.")
