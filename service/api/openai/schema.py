"""The wire types: one pydantic model an endpoint, every field with its meaning.

Strict: no string is taken for a number, nothing unknown passes. `null` means "not given". What
other servers know and this one does not is in `UNSUPPORTED`: refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from service.api.fields import (
    Content,
    FieldFault,
    Label,
    LogitBias,
    Metadata,
    MinP,
    ModelName,
    Penalty,
    Prompt,
    RepetitionPenalty,
    Seed,
    StopIds,
    StopStrings,
    Temperature,
    Text,
    TokenIds,
    TopP,
)
from service.api.generation.manifest import Endpoint
from service.api.structured.schema import ResponseFormat, StructuredOutputs
from service.api.tools.schema import CalledTools, ChatToolChoice, Tools
from service.api.wire import Closed
from service.errors import BadRequest

MAX_MESSAGES = 1024
MAX_PRIORITY = 2
MAX_TOP_K = 2**31 - 1

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = MappingProxyType({
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "structural_tag": (),
    "grammar": (),
    "json_schema": (),
    "audio": (),
    "images": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "chat_template": (),
    "documents": (),
    "mm_processor_kwargs": (),
    "cache_salt": (),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "use_beam_search": (False,),
    "length_penalty": (),
    "early_stopping": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "lora_request": (),
    "typical_p": (),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "return_tokens_as_token_ids": (False,),
})  # fmt: skip
"""Field -> the values that ask for nothing and so may pass."""


class Wire(Closed):
    """What all bodies have in common: they know by name what they do not support."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, value: Any) -> Any:  # noqa: ANN401  # any JSON
        if not isinstance(value, dict):
            return value
        foreign = cls.unsupported.keys() & value.keys() - cls.model_fields.keys()
        for name in sorted(foreign):
            asked = value[name]
            harmless = any(type(asked) is type(v) and asked == v for v in cls.unsupported[name])
            if asked is not None and not harmless:
                message = f"{name} is not supported by this server"
                raise BadRequest(message, code="unsupported_parameter", param=name)
        return {key: item for key, item in value.items() if key not in foreign}


class StreamOptions(Wire):
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


class SamplingBody(Wire):
    """The fields that all generating endpoints share."""

    stop_field: ClassVar[str] = "stop"

    model: ModelName = Field(description="The id of the model, as /v1/models lists it.")
    min_tokens: int | None = Field(
        None, ge=0, description="Tokens before which no end or stop token is sampled. Default 0."
    )
    temperature: Temperature = Field(
        None, description="0 is greedy; 1 samples from the model's own distribution. Default 1."
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        le=MAX_TOP_K,
        description="Sample from the k likeliest tokens only; 0 or -1: from all.",
    )
    top_p: TopP = Field(
        None, description="Sample from the likeliest tokens that hold this much probability."
    )
    min_p: MinP = Field(
        None, description="Drop tokens less likely than this part of the likeliest. Default 0."
    )
    presence_penalty: Penalty = Field(
        None, description="Taken once from the logit of each token in the answer so far."
    )
    frequency_penalty: Penalty = Field(
        None, description="Taken from a token's logit for each time it is in the answer so far."
    )
    repetition_penalty: RepetitionPenalty = Field(
        None, description="Divides the logits of tokens seen in prompt or answer. Default 1."
    )
    logit_bias: LogitBias = Field(
        None, description="Token id -> number from -100 to 100 that is added to its logit."
    )
    seed: Seed = Field(
        None, description="The same seed gives the same answer. Without it one is drawn."
    )
    stop: StopStrings = Field(
        None, description="Strings that end the answer; they are not part of it."
    )
    stop_token_ids: StopIds = Field(
        None, description="Token ids that end the answer, besides the model's own."
    )
    ignore_eos: bool | None = Field(
        None, description="Go on after the model's own end tokens. Default false."
    )
    stream: bool | None = Field(
        None, description="Answer with server-sent events, a chunk as soon as there is text."
    )
    priority: int | None = Field(
        None, ge=0, le=MAX_PRIORITY, description="0 goes before 1 before 2. Default 1."
    )
    on_disconnect: Literal["cancel", "continue"] | None = Field(
        None,
        description="What becomes of the answer when the connection is lost. Default: cancel, "
        "at once, or after a grace where X-Quire-Event-Ids makes the stream resumable.",
    )
    user: Label | None = Field(None, description="Accepted for compatibility; has no effect.")
    metadata: Metadata = Field(
        None, description="Up to 16 short texts by name. Only a response gives them back."
    )
    safety_identifier: Label | None = Field(
        None, description="Accepted for compatibility; has no effect."
    )
    prompt_cache_key: Label | None = Field(
        None, description="Accepted for compatibility; prefixes are cached without it."
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


def content_is_optional(schema: dict[str, Any]) -> None:
    """Adjusts the schema of a message: the assistant's content may be null, empty or missing."""
    schema["required"].remove("content")
    content = schema["properties"]["content"]
    kinds = [kind | {"minItems": 0} if "minItems" in kind else kind for kind in content["anyOf"]]
    schema["properties"]["content"] = content | {"anyOf": [*kinds, {"type": "null"}]}


def with_assistant_content(message: Any) -> Any:  # noqa: ANN401  # any JSON
    """The message; if it is the assistant's and has no content, the empty text is its content."""
    if isinstance(message, dict) and message.get("role") == "assistant":
        return message if message.get("content") not in (None, []) else message | {"content": ""}
    return message


class Message(Wire):
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
            raise FieldFault("invalid_value", "goes with the role assistant only")
        return None if value == [] else value  # an empty list of calls, as clients send it back

    @field_validator("tool_call_id")
    @classmethod
    def _only_a_tool_answers(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if role == "tool" and value is None:
            raise FieldFault("missing_required_parameter", "goes with the role tool")
        if role != "tool" and value is not None:
            raise FieldFault("invalid_value", "goes with the role tool only")
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


class TokenizeBody(Wire):
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


class DetokenizeBody(Wire):
    """The body of POST /detokenize."""

    model: ModelName | None = Field(
        None, description="The id of the model; the only one if absent."
    )
    tokens: TokenIds = Field(description="The token ids to make text of.")


class ErrorFields(BaseModel):
    """What is wrong."""

    message: str = Field(description="For people: the limit that was broken.")
    type: str = Field(description="The kind of error, as OpenAI names it.")
    param: str | None = Field(description="The dotted path of the field at fault.")
    code: str = Field(description="For programs: which error it is.")
    request_id: str = Field(
        "",
        description="With `shutting_down`: the call to read on at another replica, if it can be.",
    )
    last_event_id: str = Field("", description="The event after which to read on.")


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorFields = Field(description="What is wrong.")


ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer: one JSON object, or with stream its chunks as events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}
