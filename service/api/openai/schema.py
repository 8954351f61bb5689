"""The bodies of POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from service.api.generation.request import Effort
from service.api.http.fields import (
    AllowedIds,
    Content,
    FieldError,
    Label,
    NoEffect,
    OutputLimit,
    Prompt,
    ServiceTier,
    StopStrings,
    Text,
)
from service.api.http.models import (
    MAX_INT,
    MAX_MESSAGES,
    AnswerModel,
    Assistant,
    CallId,
    Count,
    Created,
    ModelId,
    NumericClass,
    SamplingBody,
    StrictModel,
    TemplateOptions,
    WireModel,
)
from service.api.structured.grammar import ResponseFormat, StructuredOutputs
from service.api.tools.schema import ChatToolChoice, Message, Tools


class StreamOptions(WireModel):
    """Options of a stream."""

    include_usage: bool | None = Field(
        None, description="End the stream with a chunk that has the token counts."
    )
    continuous_usage_stats: bool | None = Field(
        None, description="Add the token counts so far to every chunk."
    )
    include_obfuscation: bool | None = Field(
        None,
        description="Pad each chunk by a field obfuscation, so that its size does not show the "
        "length of its text. Default false.",
    )


def _not_zero(value: int) -> int:
    if value == 0:
        raise FieldError("integer_below_min_value", "must be at least 1, or -1")
    return value


class GenerationBody(SamplingBody):
    """The fields that completions and chat completions share."""

    n: int | None = Field(None, ge=1, description="Choices per prompt. Default 1.")
    stream_options: StreamOptions | None = Field(
        None, description="Options of the stream; needs stream."
    )
    return_token_ids: bool | None = Field(
        None, description="Also return the token ids of prompt and output."
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="Keep the stop string, or the text of the stop token. Default false."
    )
    skip_special_tokens: bool | None = Field(
        None,
        description="Leave special tokens out of the text. Default true. With false they are shown "
        "by their names, and reasoning is not separated; not with tools.",
    )
    bad_words: StopStrings = Field(
        None,
        description="Texts that the output must not contain. Not with a grammar, tools or a budget "
        "of reasoning.",
    )
    allowed_token_ids: AllowedIds = Field(
        None,
        description="The only tokens that the output may contain. Not with a grammar, tools or a "
        "budget of reasoning.",
    )
    return_tokens_as_token_ids: bool | None = Field(
        None, description="In log probabilities, name each token token_id:<id>, not by its text."
    )
    truncate_prompt_tokens: (
        Annotated[
            int,
            Field(ge=-1, le=MAX_INT, json_schema_extra={"not": {"const": 0}}),
            AfterValidator(_not_zero),
        ]
        | None
    ) = Field(
        None,
        description="Keep only this many of the prompt's last tokens; -1: as many as fit beside "
        "max_tokens.",
    )
    response_format: ResponseFormat | None = Field(
        None, description="The format of the output: text, a JSON object, or JSON of a schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="What the output must match: a schema, a regex, a choice, a grammar."
    )
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        description="Also return the log probabilities of the prompt's tokens, and this many top "
        "log probabilities for each.",
    )


class CompletionBody(GenerationBody):
    """The body of POST /v1/completions."""

    prompt: Prompt = Field(
        description="Text, token ids, or a list of texts or of lists of token ids."
    )
    decoder_prompt: Text | None = Field(
        None,
        description="Text that the answer of an encoder-decoder continues; `prompt` is its source.",
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Maximum number of output tokens; 0 with echo: the prompt is the answer. "
        "Default 16.",
    )
    best_of: int | None = Field(
        None,
        ge=1,
        description="Generate this many choices and return the n with the highest mean log "
        "probability. Not with stream.",
    )
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(
        None,
        ge=0,
        description="Return log probabilities, and this many top log probabilities for each token.",
    )
    add_special_tokens: bool | None = Field(
        None, description="Prepend the model's begin token to a text prompt. Default true."
    )
    parse_special: bool | None = Field(
        None,
        description="Read special tokens that a text prompt spells as such. Default true. The "
        "content of messages is always text.",
    )


class Prediction(StrictModel):
    """Text that the answer is expected to contain."""

    type: Literal["content"] = Field(description="The type of prediction.")
    content: Content = Field(description="The text, or a list of text parts.")


class ReasoningOptions(StrictModel):
    """Some clients send reasoning_effort in an object, as in responses."""

    effort: Effort | None = Field(None, description="As reasoning_effort; they must agree.")
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Accepted for compatibility: the whole reasoning is returned."
    )


class ChatBody(GenerationBody, TemplateOptions):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The messages so far."
    )
    max_tokens: OutputLimit | None = Field(
        None,
        description="Maximum number of output tokens. Default: the rest of the context.",
    )
    max_completion_tokens: OutputLimit | None = Field(
        None, description="The newer name of max_tokens. If both are given, they must agree."
    )
    tools: Tools = Field(None, description="Functions and custom tools that the model may call.")
    tool_choice: ChatToolChoice = Field(
        None,
        description="none, auto, required, the one tool to call (once), or allowed_tools with a "
        "mode and the tools that may be called. Default: auto with tools.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether one answer may contain several calls. Default true."
    )
    reasoning_effort: Effort | None = Field(
        None,
        description="none and minimal switch thinking off, if the chat template can; other values "
        "have an effect on templates with grades of thinking.",
    )
    reasoning: ReasoningOptions | None = Field(
        None, description="An object with effort, another way to give reasoning_effort."
    )
    thinking_token_budget: int | None = Field(
        None,
        ge=0,
        le=MAX_INT,
        description="Maximum number of tokens of reasoning: then it is ended and the answer "
        "begins. No effect on models that do not think.",
    )
    include_reasoning: bool | None = Field(
        None, description="Return the reasoning, apart from the content. Default true."
    )
    logprobs: bool | None = Field(None, description="Return the log probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, description="Also return this many top log probabilities; needs logprobs."
    )
    prediction: Prediction | None = Field(
        None,
        description="Text that the answer is expected to contain, such as the file to edit. It can "
        "make the answer faster, by speculation, and never changes it.",
    )
    service_tier: ServiceTier = None
    store: bool | None = Field(
        None,
        description="Accepted for compatibility; chat completions cannot be retrieved later, "
        "except by resuming their stream.",
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="Accepted for compatibility; has no effect: ask for it in a message."
    )
    modalities: Annotated[list[Literal["text"]] | None, Field(max_length=1)] = Field(
        None, description='The kinds of output: only ["text"].'
    )
    prompt_cache_retention: Label | None = Field(
        None, description="Accepted for compatibility; cached prefixes stay while there is room."
    )
    prompt_cache_options: NoEffect = None


class PromptDetails(AnswerModel):
    """Details of the prompt's tokens."""

    cached_tokens: Count = Field(description="Tokens found in the prefix cache.")


class CompletionDetails(AnswerModel):
    """Details of the generated tokens."""

    reasoning_tokens: Count = Field(description="Tokens of the reasoning.")


class TokenUsage(AnswerModel):
    """Token counts."""

    prompt_tokens: Count = Field(description="Tokens of the prompts, each counted once.")
    completion_tokens: Count = Field(description="Tokens of all generated choices.")
    total_tokens: Count = Field(description="The sum of both.")
    prompt_tokens_details: PromptDetails = Field(description="Details of the prompt's tokens.")
    completion_tokens_details: CompletionDetails = Field(
        description="Details of the generated tokens."
    )


class Answer(AnswerModel):
    """What both kinds of answers have."""

    id: CallId
    created: Created
    model: ModelId
    system_fingerprint: NumericClass
    usage: TokenUsage = Field(description="Token counts.")
    service_tier: str | None = Field(None, description="The tier that was used, if one was given.")


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


class Completion(Answer):
    """Completions of the prompts."""

    object: Literal["text_completion"] = Field(description="The type of this object.")
    choices: list[CompletionChoice] = Field(description="All choices.")


class ChatLogprobs(AnswerModel):
    """An object per token."""

    content: list[dict[str, Any]] = Field(description="The tokens in order.")


class AssistantMessage(AnswerModel):
    """The assistant's message."""

    role: Assistant
    content: str | None = Field(
        description="The text; null if there are only tool calls or reasoning."
    )
    refusal: None = Field(description="Always null: a refusal is text.")
    annotations: list[dict[str, Any]] = Field(description="Always empty.")


class ChatChoice(Choice):
    """One choice of a chat completion."""

    message: AssistantMessage = Field(description="The assistant's message.")
    logprobs: ChatLogprobs | None = Field(description="Only if requested.")


class ChatCompletion(Answer):
    """An answer to a chat."""

    object: Literal["chat.completion"] = Field(description="The type of this object.")
    choices: list[ChatChoice] = Field(description="All choices.")
