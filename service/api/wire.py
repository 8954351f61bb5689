"""The pydantic models that bodies are made of, in the parts that several endpoints share.

Strict: a string is not accepted as a number, and an unknown field is an error. `null` means "not
given". Fields of other servers that this one does not support are in `UNSUPPORTED`: they are
rejected by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from service.api.fields import (
    MAX_ITEMS,
    Content,
    FieldError,
    Ignored,
    Label,
    LogitBias,
    Metadata,
    MinP,
    ModelName,
    NoEffect,
    OnDisconnect,
    Penalty,
    Priority,
    RepetitionPenalty,
    Seed,
    StopIds,
    StopStrings,
    StrictModel,
    Temperature,
    Text,
    TopP,
)
from service.api.tools.chat import ChatMessage
from service.api.tools.schema import CalledTools
from service.errors import BadRequest

MAX_MESSAGES = 1024
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
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
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


class Message(MessageModel):
    """One message of a chat. Accepts an assistant message as this server and others return it."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="The author of the message."
    )
    content: Content = Field(
        description="The text, or a list of text parts. The assistant's may be null or empty."
    )
    reasoning_content: Text | None = Field(
        None, description="The assistant's reasoning before the text, for the chat template."
    )
    reasoning: Text | None = Field(
        None, description="The same as `reasoning_content`, which takes precedence."
    )
    refusal: Text | None = Field(
        None, description="The assistant's text instead of the content, if it refused to answer."
    )
    provider_specific_fields: NoEffect = None
    annotations: Annotated[list[dict[str, Any]] | None, Field(max_length=MAX_ITEMS)] = Field(
        None, description="Citations of an earlier answer. Accepted; has no effect."
    )
    name: Label | None = Field(None, description="The author's name, for the chat template.")
    tool_calls: CalledTools = Field(None, description="The tool calls of the assistant.")
    tool_call_id: Label | None = Field(
        None, validate_default=True, description="The call that a message of a tool answers."
    )

    @field_validator("tool_calls", "reasoning_content", "reasoning", "refusal", "annotations")
    @classmethod
    def _needs_assistant(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401
        if value is not None and info.data.get("role", "assistant") != "assistant":
            raise FieldError("invalid_value", "needs the role assistant")
        return None if value == [] else value  # clients send an empty list of calls back

    @field_validator("tool_call_id")
    @classmethod
    def _needs_tool(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if role == "tool" and value is None:
            raise FieldError("missing_required_parameter", "is required with the role tool")
        if role != "tool" and value is not None:
            raise FieldError("invalid_value", "needs the role tool")
        return value

    def chat_message(self) -> ChatMessage:
        return ChatMessage(
            role=self.role,
            content=self.content or self.refusal or "",
            name=self.name,
            reasoning=self.reasoning_content or self.reasoning,
            tool_calls=tuple(called.call() for called in self.tool_calls or ()),
            tool_call_id=self.tool_call_id,
        )


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
        description="Sample from the k most likely tokens only; 0 or -1: from all.",
    )
    top_p: TopP = Field(
        None, description="Sample from the most likely tokens that have this total probability."
    )
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
    seed: Seed = Field(
        None, description="The same seed gives the same answer. Default: a random one."
    )
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
