"""The body of POST /v1/responses, and the chat that it asks for.

A response is a chat with other names: `as_chat` is where the names end, so that prompt, limits and
sampling are decided by the same code. State kept on the server is refused by name, and so are
tools that are no functions of the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from service.api.fields import FieldError, Label, ResponseContent, Text
from service.api.openai.schema import ChatBody, Message
from service.api.responses.tools import (
    InputCall,
    InputResult,
    ResponseToolChoice,
    ResponseTools,
    kind_of_item,
    told_choice,
)
from service.api.structured.schema import TextFormat, TextOptions
from service.api.tools.schema import CalledFunction, CalledTool, Mode
from service.api.wire import (
    MAX_MESSAGES,
    UNSUPPORTED,
    SamplingBody,
    WireModel,
    content_is_optional,
    with_assistant_content,
)
from service.errors import BadRequest

LOGPROBS = "message.output_text.logprobs"

_PLAIN_TEXT = {"format": {"type": "text"}}
_SHARED = SamplingBody.model_fields.keys()


class InputMessage(WireModel):
    """One item of the input: a message, also one of an earlier response's output."""

    model_config = ConfigDict(json_schema_extra=content_is_optional)
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {**UNSUPPORTED, "tool_calls": ([],)}
    )

    type: Literal["message"] | None = Field(None, description="What kind of item it is.")
    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.")
    content: ResponseContent = Field(
        description="The text, or a list of text parts. The assistant's may be null or empty."
    )
    reasoning_content: Text | None = Field(
        None, description="The assistant's reasoning before the text, for the chat template."
    )
    id: Label | None = Field(None, description="Accepted for compatibility; has no effect.")
    status: Label | None = Field(None, description="Accepted for compatibility; has no effect.")
    phase: Label | None = Field(None, description="Accepted for compatibility; has no effect.")

    @model_validator(mode="before")
    @classmethod
    def _complete_assistant(cls, value: Any) -> Any:  # noqa: ANN401  # any JSON
        return with_assistant_content(value)

    @field_validator("reasoning_content")
    @classmethod
    def _only_the_assistant_has(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401
        if value is not None and info.data.get("role", "assistant") != "assistant":
            raise FieldError("invalid_value", "goes with the role assistant only")
        return value


class ReasoningPart(WireModel):
    """A part of a reasoning item."""

    type: Literal["reasoning_text", "summary_text"] = Field(description="What kind of part it is.")
    text: Text = Field(description="The text.")


_Parts = Annotated[list[ReasoningPart] | None, Field(max_length=MAX_MESSAGES)]


class InputReasoning(WireModel):
    """An item of the input: the assistant's reasoning before its next message or call."""

    type: Literal["reasoning"] = Field(description="What kind of item it is.")
    summary: _Parts = Field(None, description="Used if there is no content.")
    content: _Parts = Field(None, description="The reasoning, for the chat template.")
    encrypted_content: Text | None = Field(
        None, description="Accepted for compatibility; has no effect."
    )
    id: Label | None = Field(None, description="Accepted for compatibility; has no effect.")
    status: Label | None = Field(None, description="Accepted for compatibility; has no effect.")

    @property
    def text(self) -> str | None:
        """The reasoning; None if it has no text."""
        return "".join(part.text for part in self.content or self.summary or ()) or None


Item = Annotated[
    Annotated[InputMessage, Tag("(message)")]
    | Annotated[InputReasoning, Tag("(reasoning)")]
    | Annotated[InputCall, Tag("(function_call)")]
    | Annotated[InputResult, Tag("(function_call_output)")],
    Discriminator(kind_of_item),
]


_Item = InputMessage | InputReasoning | InputCall | InputResult


def _items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]


class ResponseBody(SamplingBody):
    """The body of POST /v1/responses."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            **UNSUPPORTED,
            "max_tool_calls": (),
            "previous_response_id": (),
            "conversation": (),
            "prompt": (),
            "reasoning": ({}, {"effort": None, "summary": None}),
            "response_format": (),
            "structured_outputs": (),
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
        list[Item],
        BeforeValidator(_items, json_schema_input_type=str | _Items),
    ] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A text, or the messages, calls and results so far. No conversation is kept: "
        "send all of it.",
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
    text: TextOptions | None = Field(None, description="What the text of the answer must be.")
    tools: ResponseTools = Field(None, description="Functions that the model may call.")
    tool_choice: ResponseToolChoice = Field(
        None, description="none, auto, required, or the one function to call. Default auto."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether one response may hold several calls. Default true."
    )

    @property
    def stored(self) -> bool:
        """Whether it can be retrieved; so it is where nothing is said."""
        return self.store is not False


class ResponseChat(ChatBody):
    """A chat whose faults are told in a response's names."""

    prompt_field: ClassVar[str] = "input"
    limit_field: ClassVar[str] = "max_output_tokens"
    format_field: ClassVar[str] = "text.format"
    schema_field: ClassVar[str] = "text.format.schema"
    function_field: ClassVar[str] = "tools[{}]"
    parameters_field: ClassVar[str] = "tools[{}].parameters"


def as_chat(body: ResponseBody) -> ResponseChat:
    """The chat that a response asks for. Raises BadRequest."""
    if body.background and not body.stored:
        raise BadRequest("background needs store to be true", param="background")
    if body.background and body.on_disconnect == "cancel":
        raise BadRequest("background needs no reader: it cannot cancel", param="on_disconnect")
    scored = LOGPROBS in (body.include or ())
    asked = _text_format(body)
    if body.top_logprobs and not scored:
        raise BadRequest(f"top_logprobs needs include to hold {LOGPROBS}", param="top_logprobs")
    if scored and body.tools:
        raise BadRequest("log probabilities are not told beside tools", param="include")
    messages = chat_messages(body.input)
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
        tools=[tool.as_function() for tool in body.tools or ()],
        tool_choice=body.tool_choice if body.tools or _forced(body) else None,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=None if asked is None else asked.as_response_format(),
    )


def _forced(body: ResponseBody) -> bool:
    """Any other choice asks for nothing where there are no tools, and clients send it always."""
    return body.tool_choice is not None and body.tool_choice.mode is Mode.REQUIRED


def chat_messages(items: Sequence[_Item]) -> list[Message]:
    """The messages of a chat. Calls, and what was said just before them, are one message."""
    messages: list[Message] = []
    reasoning: str | None = None  # of the next item, if that is the assistant's
    for item in items:
        if isinstance(item, InputReasoning):
            reasoning = item.text
            continue
        if isinstance(item, InputCall):
            said = _said_before(messages)
            messages.append(_with_call(said, item, reasoning))
        else:
            messages.append(_as_message(item, reasoning))
        reasoning = None
    return messages


def _as_message(item: InputMessage | InputResult, reasoning: str | None) -> Message:
    if isinstance(item, InputResult):
        return Message.model_construct(role="tool", content=item.output, tool_call_id=item.call_id)
    if item.role != "assistant":
        reasoning = None
    return Message.model_construct(
        role=item.role,
        content=item.content,
        reasoning_content=item.reasoning_content or reasoning,
    )


def _said_before(messages: list[Message]) -> Message:
    """Takes the assistant message that a call belongs to off the list, or makes an empty one."""
    if messages and messages[-1].role == "assistant":
        return messages.pop()
    return Message.model_construct(role="assistant", content="")


def _with_call(said: Message, item: InputCall, reasoning: str | None) -> Message:
    function = CalledFunction.model_construct(name=item.name, arguments=item.arguments)
    call = CalledTool.model_construct(id=item.call_id, type="function", function=function)
    return Message.model_construct(
        role="assistant",
        content=said.content,
        reasoning_content=said.reasoning_content or reasoning,
        tool_calls=[*(said.tool_calls or ()), call],
    )


def _text_format(body: ResponseBody) -> TextFormat | None:
    return None if body.text is None else body.text.format


def given_back(body: ResponseBody, *, max_bytes: int) -> dict[str, Any]:
    """The fields of the body that the response repeats, which are stored. Raises BadRequest for one
    that has more bytes as JSON.
    """
    echoed = _echoed(body)
    for name, value in echoed.items():
        if len(orjson.dumps(value)) > max_bytes:
            raise BadRequest(
                f"{name} may have at most {max_bytes} bytes as JSON",
                code="string_above_max_length",
                param=name,
            )
    return echoed


def _echoed(body: ResponseBody) -> dict[str, Any]:
    asked = _text_format(body)
    return {
        "background": body.background or False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": body.stored,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": _PLAIN_TEXT if asked is None else {"format": asked.model_dump(exclude_none=True)},
        "tool_choice": told_choice(body.tool_choice),
        "tools": [tool.told() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
