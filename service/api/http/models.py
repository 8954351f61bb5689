"""The pydantic models that several endpoints share: parts of bodies, and of answers.

Bodies are strict: a string is not accepted as a number, and an unknown field is an error. `null`
means "not given". Fields of other servers that this one does not support are in `UNSUPPORTED`: they
are rejected by name, never ignored. The models of answers describe; no answer is built from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import orjson
from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.api.http.fields import (
    Ignored,
    Label,
    LogitBias,
    Metadata,
    MinP,
    OnDisconnect,
    Penalty,
    Priority,
    RepetitionPenalty,
    RequiredModel,
    Seed,
    StopIds,
    StopStrings,
    Temperature,
    TopP,
)
from service.errors import BadRequest

MAX_MESSAGES = 1024
MAX_INT = 2**31 - 1
MAX_KEYS = 256  # of one object

_NEVER = (
    "parallel_tool_calls", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_decoding_backend", "structural_tag", "grammar", "json_schema", "audio", "images",
    "prediction", "reasoning_effort", "verbosity", "web_search_options", "moderation",
    "chat_template", "documents", "mm_processor_kwargs", "cache_salt", "prompt_logprobs",
    "prompt_embeds", "allowed_token_ids", "logits_processors", "truncate_prompt_tokens",
    "kv_transfer_params", "vllm_xargs", "lora_request",
)  # fmt: skip
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = MappingProxyType({
    **dict.fromkeys(_NEVER, ()),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "typical_p": (1, 1.0),
    "repeat_penalty": (1, 1.0),
    "mirostat": (0,),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
    "cache_prompt": (True, False),
    "id_slot": (-1,),
    "timings_per_token": (False,),
    "return_progress": (False,),
    "reasoning_format": ("auto", "deepseek"),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "no_stop_trim": (False,),
    "return_hidden_states": (False,),
    "return_tokens_as_token_ids": (False,),
})  # fmt: skip
"""Field -> the values that have no effect, which are accepted."""


class StrictModel(BaseModel):
    """Accepts no string as a number, and no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _reject_many_keys(cls, value: Any) -> Any:  # noqa: ANN401  # any JSON
        if isinstance(value, dict) and len(value) > MAX_KEYS:  # before each becomes an error
            message = f"an object of the body may have at most {MAX_KEYS} fields"
            raise BadRequest(message, code="object_above_max_length")
        return value


class WireModel(StrictModel):
    """A part of a body. Fields of other servers that are not supported are rejected by name."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED

    @model_validator(mode="before")
    @classmethod
    def _reject_unsupported(cls, value: Any) -> Any:  # noqa: ANN401  # any JSON
        if not isinstance(value, dict):
            return value
        foreign = cls.unsupported.keys() & value.keys() - cls.model_fields.keys()
        for name in sorted(foreign):
            given = value[name]
            accepted = any(type(given) is type(v) and given == v for v in cls.unsupported[name])
            if given is not None and not accepted:
                message = f"{name} is not supported by this server"
                raise BadRequest(message, code="unsupported_parameter", param=name)
        return {key: item for key, item in value.items() if key not in foreign}


def _content_is_optional(schema: dict[str, Any]) -> None:
    schema["required"].remove("content")
    content = schema["properties"]["content"]
    kinds = [kind | {"minItems": 0} if "minItems" in kind else kind for kind in content["anyOf"]]
    schema["properties"]["content"] = content | {"anyOf": [*kinds, {"type": "null"}]}


class MessageModel(WireModel):
    """A message. The content of an assistant's message may be null, empty or missing."""

    model_config = ConfigDict(json_schema_extra=_content_is_optional)

    @model_validator(mode="before")
    @classmethod
    def _complete_assistant(cls, value: Any) -> Any:  # noqa: ANN401  # any JSON
        if isinstance(value, dict) and value.get("role") == "assistant":
            return value if value.get("content") not in (None, []) else value | {"content": ""}
        return value


class TemplateOptions(WireModel):
    """How the chat template renders the messages."""

    add_generation_prompt: bool | None = Field(
        None, description="Begin the assistant's turn after the messages. Default true."
    )
    continue_final_message: bool | None = Field(
        None, description="Continue the last message instead of answering it."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Options of the model's chat template; a fixed set is allowed."
    )


class SamplingBody(WireModel):
    """The fields that all generating endpoints share."""

    model: RequiredModel
    min_tokens: int | None = Field(
        None, ge=0, description="Tokens before which no end or stop token is sampled. Default 0."
    )
    temperature: Temperature = None
    top_k: int | None = Field(
        None,
        ge=-1,
        le=MAX_INT,
        description="Sample from the k most likely tokens only; 0 or -1: from all.",
    )
    top_p: TopP = None
    min_p: MinP = Field(
        None,
        description="Exclude tokens below this fraction of the highest probability. Default 0.",
    )
    presence_penalty: Penalty = Field(
        None, description="Subtracted once from the logit of each token in the output so far."
    )
    frequency_penalty: Penalty = Field(
        None,
        description="Subtracted from a token's logit for each occurrence in the output so far.",
    )
    repetition_penalty: RepetitionPenalty = Field(
        None, description="Divides the logits of tokens in prompt or output. Default 1."
    )
    logit_bias: LogitBias = Field(
        None, description="Token id -> number from -100 to 100, added to its logit."
    )
    seed: Seed = None
    stop: StopStrings = Field(
        None, description="Strings that end the answer; they are not part of it."
    )
    stop_token_ids: StopIds = Field(
        None, description="Token ids that end the answer, in addition to the model's own."
    )
    ignore_eos: bool | None = Field(
        None, description="Continue after the model's own end tokens. Default false."
    )
    stream: bool | None = Field(
        None, description="Answer with server-sent events, as soon as there is text."
    )
    priority: Priority = None
    on_disconnect: OnDisconnect = None
    user: Ignored = None
    metadata: Metadata = Field(
        None, description="Up to 16 short texts by name. Only responses return them."
    )
    safety_identifier: Ignored = None
    prompt_cache_key: Label | None = Field(
        None, description="Accepted for compatibility; prefixes are cached without it."
    )


EVENTS = "text/event-stream"


class AnswerModel(BaseModel):
    """Fields without a default are always present; more may be added."""

    model_config = ConfigDict(protected_namespaces=())


Count = Annotated[int, Field(ge=0)]
CallId = Annotated[str, Field(description="The call's id, prefixed with the kind of answer.")]
Created = Annotated[Count, Field(description="When the call arrived, in Unix seconds.")]
ModelId = Annotated[str, Field(description="The id of the model.")]
ContextLength = Annotated[
    Count, Field(description="Maximum context length (prompt + output), in tokens.")
]
NumericClass = Annotated[
    str,
    Field(description="Numeric class: within it, equal requests get bit-identical answers."),
]
Assistant = Annotated[Literal["assistant"], Field(description="The role of the author.")]
TokenList = Annotated[list[Count], Field(description="Token ids.")]


class ErrorFields(BaseModel):
    """What is wrong."""

    message: str = Field(description="For people: what was wrong, and the limit.")
    type: str = Field(description="The kind of error, as OpenAI names it.")
    param: str | None = Field(description="The dotted path of the invalid field.")
    code: str = Field(description="For programs: the error's code.")
    request_id: str = Field(
        "",
        description="With `shutting_down`: the call to resume at another replica, if possible.",
    )
    last_event_id: str = Field("", description="With it: the event to resume after.")


class ErrorBody(BaseModel):
    """The body of every answer with status 400 or higher."""

    error: ErrorFields = Field(description="What is wrong.")


class StreamEvent(AnswerModel):
    """A server-sent event. Keep-alive comments between events are not listed."""

    data: str = Field(description="A chunk of the answer as JSON; [DONE] ends some streams.")
    event: str = Field("", description="The type of the event, in APIs that have event types.")
    id: str = Field("", description="The position to resume after, if event ids were requested.")


class StreamCancelled(AnswerModel):
    """Confirms that a call was cancelled."""

    id: CallId
    object: Literal["stream"] = Field(description="The type of this object.")
    cancelled: Literal[True] = Field(description="Always true.")


def json_response(value: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), media_type="application/json", headers=headers)


def described(
    model: type[BaseModel] | None,
    *,
    stream: bool = False,
    stored: type[BaseModel] | None = None,
) -> dict[int | str, Any]:
    """The `responses=` of a route that answers with this JSON, with a stream of events, or in the
    background with the object that is stored.
    """
    answer: dict[str, Any] = {"description": "The answer."}
    if model is not None:
        answer["model"] = model if stored is None else model | stored
    if stream:
        answer["description"] = (
            "The answer: one JSON object, or with `stream` its chunks as events."
        )
        answer["content"] = {EVENTS: {"schema": StreamEvent.model_json_schema()}}
    return {200: answer}


def refused(model: type[BaseModel]) -> dict[int | str, Any]:
    """The `responses=` of a router or an application whose errors have this shape."""
    return {"4XX": {"model": model, "description": "The request was rejected."}}


class StoredResult(AnswerModel):
    """The state of a call whose answer is one result, and the result once it is there."""

    id: CallId
    endpoint: str = Field(description="The endpoint that was called.")
    created: Created
    model: ModelId
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"] = Field(
        description="queued until the first input is done."
    )
    inputs: Count = Field(description="The number of inputs.")
    completed: Count = Field(description="Inputs that are done.")
    result: dict[str, Any] | None = Field(description="The answer of the endpoint, if completed.")
    error: dict[str, Any] | None = Field(description="Why it failed.")
