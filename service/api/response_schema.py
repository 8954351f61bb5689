"""The body of POST /v1/responses, and the chat that it asks for.

A response is a chat with other names: `as_chat` is where the names end, so that prompt, limits and
sampling are decided by the same code. State kept on the server and tools are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from service.api.fields import ResponseContent, Text
from service.api.schemas import (
    MAX_MESSAGES,
    UNSUPPORTED,
    ChatBody,
    Message,
    SamplingBody,
    Wire,
)
from service.errors import BadRequest

LOGPROBS = "message.output_text.logprobs"

_PLAIN_TEXT = {"format": {"type": "text"}}
_SHARED = SamplingBody.model_fields.keys()


class InputMessage(Wire):
    """One item of the input: a message, also one that an earlier response put out."""

    type: Literal["message"] | None = Field(None, description="Only messages are known.")
    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.")
    content: ResponseContent = Field(description="The text, or a list of text parts.")
    id: Text | None = Field(None, description="Accepted for compatibility; has no effect.")
    status: Text | None = Field(None, description="Accepted for compatibility; has no effect.")
    phase: Text | None = Field(None, description="Accepted for compatibility; has no effect.")


def _items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponseBody(SamplingBody):
    """The body of POST /v1/responses."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            **UNSUPPORTED,
            "tool_choice": ("none", "auto"),
            "parallel_tool_calls": (True, False),
            "max_tool_calls": (),
            "previous_response_id": (),
            "conversation": (),
            "prompt": (),
            "reasoning": ({}, {"effort": None, "summary": None}),
            "text": ({}, _PLAIN_TEXT),
            "truncation": ("disabled",),
            "stream_options": ({}, {"include_obfuscation": False}),
            "context_management": (),
            "background_options": (),
            "prompt_cache_retention": (),
            "prompt_cache_options": (),
            "n": (1,),
        }
    )

    input: Annotated[
        list[InputMessage],
        BeforeValidator(_items, json_schema_input_type=str | list[InputMessage]),
    ] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A text, or the messages so far. No conversation is kept: send all of it.",
    )
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(
        None, ge=1, description="The most tokens to generate. Default: the rest of the context."
    )
    background: bool | None = Field(
        None,
        description="Answer at once with a response that is queued; it is made without a reader. "
        "Needs store.",
    )
    store: bool | None = Field(
        None, description="Keep the response for a while, to be retrieved by its id. Default true."
    )
    include: list[Literal["message.output_text.logprobs"]] | None = Field(
        None, max_length=8, description="Log probabilities, or nothing."
    )
    top_logprobs: int | None = Field(
        None, ge=0, description="Log probabilities of so many likeliest tokens; needs include."
    )

    @property
    def stored(self) -> bool:
        """Whether it can be retrieved; so it is where nothing is said."""
        return self.store is not False


class ResponseChat(ChatBody):
    """A chat whose faults are told in a response's names."""

    prompt_field: ClassVar[str] = "input"
    limit_field: ClassVar[str] = "max_output_tokens"


def as_chat(body: ResponseBody) -> ResponseChat:
    """The chat that a response asks for. Raises BadRequest."""
    if body.background and not body.stored:
        raise BadRequest("background needs store to be true", param="background")
    if body.background and body.on_disconnect == "cancel":
        raise BadRequest("background needs no reader: it cannot cancel", param="on_disconnect")
    scored = LOGPROBS in (body.include or ())
    if body.top_logprobs and not scored:
        raise BadRequest(f"top_logprobs needs include to hold {LOGPROBS}", param="top_logprobs")
    messages = [Message(role=item.role, content=item.content) for item in body.input]
    if body.instructions is not None:
        messages.insert(0, Message(role="system", content=body.instructions))
    shared = {name: getattr(body, name) for name in _SHARED}
    shared["on_disconnect"] = "continue" if body.background else body.on_disconnect
    # Every value was checked where it came from.
    return ResponseChat.model_construct(
        **shared,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        logprobs=scored,
        top_logprobs=body.top_logprobs,
    )


def given_back(body: ResponseBody) -> dict[str, Any]:
    """The fields of the body that the response repeats."""
    return {
        "background": body.background or False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": body.stored,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": _PLAIN_TEXT,
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
