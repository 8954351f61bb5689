"""The shapes of Anthropic's answers and errors, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.api.answers import AnswerModel, Assistant, CallId, Count, ModelId


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
