"""The pydantic models that bodies are made of, in the parts that several endpoints share.

Strict: a string is not accepted as a number, and an unknown field is an error. `null` means "not
given". Fields of other servers that this one does not support are in `UNSUPPORTED`: they are
refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.api.fields import (
    Label,
    LogitBias,
    Metadata,
    MinP,
    ModelName,
    Penalty,
    RepetitionPenalty,
    Seed,
    StopIds,
    StopStrings,
    Temperature,
    Text,
    TopP,
)
from service.errors import BadRequest

MAX_KEYS = 256


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


Ignored = Annotated[Label | None, Field(description="Accepted for compatibility; has no effect.")]
IgnoredText = Annotated[
    Text | None, Field(description="Accepted for compatibility; has no effect.")
]
CacheControl = Annotated[
    dict[str, Any] | None,
    Field(description="Accepted for compatibility; prefixes are cached without it."),
]

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
"""Field -> the values that have no effect, which are accepted."""


class WireModel(StrictModel):
    """A part of a body. Fields of other servers that are not supported are refused by name."""

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


class SamplingBody(WireModel):
    """The fields that all generating endpoints share."""

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
