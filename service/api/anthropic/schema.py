"""The bodies of POST /v1/messages and /v1/messages/count_tokens.

What this server does not support is refused by name: see `WireModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from service.api.anthropic.blocks import TextBlocks, Turn
from service.api.anthropic.tools import MessageTool, MessageToolChoice
from service.api.http.fields import (
    CacheControl,
    FieldError,
    Ignored,
    NoEffect,
    OnDisconnect,
    Priority,
    RequiredModel,
    Seed,
    StopStrings,
    TopP,
    UnitTemperature,
)
from service.api.http.models import (
    MAX_INT,
    MAX_MESSAGES,
    AnswerModel,
    Assistant,
    CallId,
    Count,
    ModelId,
    StrictModel,
    WireModel,
)
from service.api.tools.schema import MAX_TOOLS

MAX_EDITS = 16

_SHARED: Mapping[str, tuple[Any, ...]] = {
    "speed": ("standard",),
    "mcp_servers": ([],),
    "billing_policy": (),
    "compaction": (),
    "user_profile_id": (),
    "workspace_id": (),
}


class _AnyThinking(WireModel):
    unsupported = MappingProxyType({"block_binding": ({},)})

    display: Literal["summarized", "omitted"] | None = Field(
        None, description="Whether the answer has the reasoning: all of it, or none."
    )

    @property
    def shown(self) -> bool:
        """Whether the answer has the reasoning."""
        return self.display != "omitted"


class BoundedThinking(_AnyThinking):
    """The model thinks before it answers, up to a limit."""

    type: Literal["enabled"] = Field(description="Reasoning with a limit.")
    budget_tokens: int = Field(
        ge=1, le=MAX_INT, description="The most tokens of reasoning; there it is ended."
    )


class FreeThinking(_AnyThinking):
    """Whether the model thinks before it answers, without a limit."""

    type: Literal["adaptive", "disabled"] = Field(
        description="disabled: the answer has no reasoning, and a chat template that can switch it "
        "off does so."
    )

    @property
    def shown(self) -> bool:
        """Whether the answer has the reasoning."""
        return super().shown and self.type != "disabled"


Thinking = Annotated[BoundedThinking | FreeThinking, Field(discriminator="type")]


class KeptThinking(StrictModel):
    """The messages whose reasoning is kept."""

    type: Literal["all", "thinking_turns"] = Field(description="All, or the last ones.")
    value: int | None = Field(
        None, ge=1, le=MAX_MESSAGES, description="How many of the last ones. Default 1."
    )


class ClearThinking(StrictModel):
    """Removes the reasoning of earlier messages from the prompt."""

    type: Literal["clear_thinking_20251015"] = Field(description="The kind of edit.")
    keep: Literal["all"] | KeptThinking | None = Field(
        None, description="What is kept. Default: the reasoning of the last message that has some."
    )

    @property
    def kept(self) -> int | None:
        """The number of messages whose reasoning is kept; None: all."""
        if self.keep == "all":
            return None
        if self.keep is None:
            return 1
        return None if self.keep.type == "all" else self.keep.value or 1


class OtherEdit(BaseModel):
    """An edit that this server does not make: a chat fits its context, or is refused."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["clear_tool_uses_20250919", "compact_20260112"] = Field(
        description="The kind of edit."
    )


class ContextManagement(StrictModel):
    """How the chat is shortened before the model reads it."""

    edits: list[Annotated[ClearThinking | OtherEdit, Field(discriminator="type")]] = Field(
        [], max_length=MAX_EDITS, description="The edits. Only clear_thinking has an effect."
    )


class OutputFormat(StrictModel):
    """The format of the text."""

    type: Literal["json_schema"] = Field(description="JSON that matches a schema.")
    schema_: dict[str, Any] = Field(alias="schema", description="The schema.")


class OutputConfig(WireModel):
    """Requirements on the answer."""

    unsupported = MappingProxyType({"task_budget": ()})

    format: OutputFormat | None = Field(
        None, description="The format of the text. Default: any text."
    )
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="How much the model thinks, if its chat template has such a setting."
    )


class CountBody(WireModel):
    """The body of POST /v1/messages/count_tokens: the fields that the prompt is made of."""

    unsupported = _SHARED

    model: RequiredModel
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
    output_format: OutputFormat | None = Field(
        None, description="The older name of output_config.format."
    )
    thinking: Thinking | None = Field(
        None, description="Whether the model thinks. Default: as its chat template does."
    )
    context_management: ContextManagement | None = Field(
        None, description="How the chat is shortened before the model reads it."
    )
    cache_control: CacheControl = None

    @field_validator("output_format")
    @classmethod
    def _given_once(cls, value: OutputFormat | None, info: ValidationInfo) -> OutputFormat | None:
        config = info.data.get("output_config")
        if value is not None and config is not None and config.format is not None:
            raise FieldError("invalid_value", "cannot be combined with output_config.format")
        return value


class MessageMetadata(WireModel):
    """Data about the call."""

    user_id: Ignored = None


class MessageBody(CountBody):
    """The body of POST /v1/messages."""

    unsupported = MappingProxyType({
        **_SHARED, "container": (), "inference_geo": (), "fallbacks": ([],), "thread": (),
        "fallback_credit_token": (), "service_tier": ("auto", "standard_only"),
    })  # fmt: skip

    max_tokens: int = Field(
        ge=1,
        le=MAX_INT,
        description="Maximum number of output tokens, cut to the rest of the context.",
    )
    temperature: UnitTemperature = None
    top_p: TopP = None
    top_k: int | None = Field(
        None,
        ge=0,
        le=MAX_INT,
        description="Sample from the k most likely tokens only; 0: from all.",
    )
    stop_sequences: StopStrings = Field(
        None, description="Strings that end the answer; they are not part of it."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    metadata: MessageMetadata | None = Field(None, description="Data about the call.")
    diagnostics: NoEffect = None
    seed: Seed = None
    priority: Priority = None
    on_disconnect: OnDisconnect = None


class AnthropicMessage(AnswerModel):
    """An answer in the shape of Anthropic's API."""

    id: CallId
    type: Literal["message"] = Field(description="The type of this object.")
    role: Assistant
    model: ModelId
    content: list[dict[str, Any]] = Field(description="Blocks: thinking, text, tool_use.")
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
