"""The shapes of OpenAI's answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.api.answers import (
    AnswerModel,
    Assistant,
    CallId,
    Count,
    Created,
    ModelId,
    NumericClass,
)


class PromptDetails(AnswerModel):
    """Details of the prompt's tokens."""

    cached_tokens: Count = Field(description="Tokens found in the prefix cache.")


class Usage(AnswerModel):
    """Token counts."""

    prompt_tokens: Count = Field(description="Tokens of the prompts, each counted once.")
    completion_tokens: Count = Field(description="Tokens of all generated choices.")
    total_tokens: Count = Field(description="The sum of both.")
    prompt_tokens_details: PromptDetails = Field(description="Details of the prompt's tokens.")


class Choice(AnswerModel):
    """One choice of an answer."""

    index: Count = Field(description="Its number, from 0; choices of the first prompt come first.")
    finish_reason: str = Field(
        description="Why it ended: stop, length, tool_calls, cancelled, deadline.",
        examples=["stop", "length"],
    )
    stop_reason: str | int | None = Field(
        description="The stop string or stop token id that ended it."
    )


class CompletionLogprobs(AnswerModel):
    """Parallel lists with an item per token."""

    tokens: list[str] = Field(description="The text of each token.")
    token_logprobs: list[float | None] = Field(
        description="The log probability of each token; null for the first token of a prompt."
    )
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The top-k tokens by their text, with their log probabilities."
    )
    text_offset: list[Count] = Field(description="The offset of each token in the text.")


class CompletionChoice(Choice):
    """One choice of a completion."""

    text: str = Field(description="The generated text, preceded by the prompt with `echo`.")
    logprobs: CompletionLogprobs | None = Field(description="Only if requested.")


class Completion(AnswerModel):
    """Completions of the prompts."""

    id: CallId
    object: Literal["text_completion"] = Field(description="The type of this object.")
    created: Created
    model: ModelId
    system_fingerprint: NumericClass
    choices: list[CompletionChoice] = Field(description="All choices.")
    usage: Usage = Field(description="Token counts.")


class ChatLogprobs(AnswerModel):
    """An object per token."""

    content: list[dict[str, Any]] = Field(description="The tokens in order.")


class ChatMessage(AnswerModel):
    """The assistant's message."""

    role: Assistant
    content: str | None = Field(description="The text; null if there are only tool calls.")


class ChatChoice(Choice):
    """One choice of a chat completion."""

    message: ChatMessage = Field(description="The assistant's message.")
    logprobs: ChatLogprobs | None = Field(description="Only if requested.")


class ChatCompletion(AnswerModel):
    """An answer to a chat."""

    id: CallId
    object: Literal["chat.completion"] = Field(description="The type of this object.")
    created: Created
    model: ModelId
    system_fingerprint: NumericClass
    choices: list[ChatChoice] = Field(description="All choices.")
    usage: Usage = Field(description="Token counts.")
