"""The wire types: one pydantic model an endpoint, every field with its meaning.

Strict: no string is taken for a number, nothing unknown passes. `null` means "not given". What
other servers know and this one does not is in `UNSUPPORTED`: refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import (
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from service.api.fields import (
    Content,
    FieldError,
    Label,
    ModelName,
    Prompt,
    Text,
    TokenIds,
)
from service.api.generation.manifest import Endpoint
from service.api.structured.schema import ResponseFormat, StructuredOutputs
from service.api.tools.schema import CalledTools, ChatToolChoice, Tools
from service.api.wire import (
    MAX_MESSAGES,
    UNSUPPORTED,
    SamplingBody,
    WireModel,
    content_is_optional,
    with_assistant_content,
)


class StreamOptions(WireModel):
    """What a stream carries besides the answer."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"include_obfuscation": (False,)}
    )

    include_usage: bool | None = Field(
        None, description="End the stream with a chunk that holds the token counts."
    )
    continuous_usage_stats: bool | None = Field(
        None, description="Put the token counts so far into every chunk."
    )


class GenerationBody(SamplingBody):
    """The fields that completions and chat completions share."""

    format_field: ClassVar[str] = "response_format"
    schema_field: ClassVar[str] = "response_format.json_schema.schema"

    n: int | None = Field(None, ge=1, description="Choices for each prompt. Default 1.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="The most tokens to generate. Default: 16 for completions, the rest of the "
        "context for chat.",
    )
    stream_options: StreamOptions | None = Field(
        None, description="What the stream carries besides the answer; needs stream."
    )
    return_token_ids: bool | None = Field(
        None, description="Also give the token ids of prompt and answer."
    )
    response_format: ResponseFormat | None = Field(
        None, description="What the answer must be: text, a JSON object, or JSON of a schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="What the answer must match: a schema, a regex, a choice, a grammar."
    )
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        description="Also give the log probabilities of the prompt's tokens, each with those of so "
        "many likeliest ones.",
    )


class CompletionBody(GenerationBody):
    """The body of POST /v1/completions."""

    endpoint: ClassVar[Endpoint] = Endpoint.COMPLETIONS
    prompt_field: ClassVar[str] = "prompt"

    prompt: Prompt = Field(
        description="Text, token ids, or a list of texts or of lists of token ids."
    )
    best_of: int | None = Field(
        None,
        ge=1,
        description="Generate so many choices and answer with the n of the highest mean log "
        "probability. Not with stream.",
    )
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(
        None, ge=0, description="Give log probabilities, also of so many likeliest tokens."
    )
    add_special_tokens: bool | None = Field(
        None, description="Begin a text prompt with the model's begin token. Default true."
    )


class Message(WireModel):
    """One message of a chat. Takes an assistant message as this server and others give it."""

    model_config = ConfigDict(json_schema_extra=content_is_optional)
    # OpenAI's client puts these into a message that it got, empty, and gives it back so.
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {**UNSUPPORTED, "refusal": (), "annotations": ([],)}
    )

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks."
    )
    content: Content = Field(
        description="The text, or a list of text parts. The assistant's may be null or empty."
    )
    reasoning_content: Text | None = Field(
        None, description="The assistant's reasoning before the text, for the chat template."
    )
    name: Label | None = Field(None, description="A name for the speaker, for the chat template.")
    tool_calls: CalledTools = Field(None, description="What the assistant called, if it did.")
    tool_call_id: Label | None = Field(
        None, validate_default=True, description="Of a tool's message: the call that it answers."
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_assistant(cls, value: Any) -> Any:  # noqa: ANN401  # any JSON
        return with_assistant_content(value)

    @field_validator("tool_calls", "reasoning_content")
    @classmethod
    def _only_the_assistant_has(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401
        if value is not None and info.data.get("role", "assistant") != "assistant":
            raise FieldError("invalid_value", "goes with the role assistant only")
        return None if value == [] else value  # an empty list of calls, as clients send it back

    @field_validator("tool_call_id")
    @classmethod
    def _only_a_tool_answers(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if role == "tool" and value is None:
            raise FieldError("missing_required_parameter", "goes with the role tool")
        if role != "tool" and value is not None:
            raise FieldError("invalid_value", "goes with the role tool only")
        return value


class ChatBody(GenerationBody):
    """The body of POST /v1/chat/completions."""

    endpoint: ClassVar[Endpoint] = Endpoint.CHAT
    prompt_field: ClassVar[str] = "messages"
    limit_field: ClassVar[str] = "max_completion_tokens"
    function_field: ClassVar[str] = "tools[{}].function"
    parameters_field: ClassVar[str] = "tools[{}].function.parameters"

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The chat so far."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="The newer name of max_tokens; both must agree."
    )
    tools: Tools = Field(None, description="Functions that the model may call.")
    tool_choice: ChatToolChoice = Field(
        None,
        description="none, auto, required, or the one function to call. Default: auto with tools.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether one answer may hold several calls. Default true."
    )
    logprobs: bool | None = Field(None, description="Give the log probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, description="Also those of so many likeliest tokens; needs logprobs."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Open the assistant's turn after the messages. Default true."
    )
    continue_final_message: bool | None = Field(
        None, description="Go on with the last message instead of answering it."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Options of the model's chat template; a fixed list is allowed."
    )


class TokenizeBody(WireModel):
    """The body of POST /tokenize: a prompt or messages."""

    prompt_field: ClassVar[str] = "messages"

    model: ModelName | None = Field(
        None, description="The id of the model; the only one if absent."
    )
    prompt: Text | None = Field(None, description="The text to tokenise.")
    messages: list[Message] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES, description="A chat, instead of a prompt."
    )
    tools: Tools = Field(None, description="Functions that the model is told of in the chat.")
    add_special_tokens: bool | None = Field(
        None, description="Begin a prompt with the model's begin token. Default true."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Open the assistant's turn after the messages. Default true."
    )
    continue_final_message: bool | None = Field(None, description="Leave the last message open.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Options of the model's chat template; a fixed list is allowed."
    )
    return_token_strs: bool | None = Field(None, description="Also give each token's text.")


class DetokenizeBody(WireModel):
    """The body of POST /detokenize."""

    model: ModelName | None = Field(
        None, description="The id of the model; the only one if absent."
    )
    tokens: TokenIds = Field(description="The token ids to make text of.")
