"""The body of POST /v1/responses, and the chat that it asks for.

A response is a chat with other names: `as_chat` is where the names end, so that prompt, limits and
sampling are decided by the same code. State kept on the server is refused by name, and so are
tools that are no functions of the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from service.api.fields import ResponseContent, Text
from service.api.grammar_schema import TextFormat, TextOptions
from service.api.response_tools import (
    InputCall,
    InputResult,
    ResponseToolChoice,
    ResponseTools,
    kind_of_item,
    told_choice,
)
from service.api.schemas import (
    MAX_MESSAGES,
    UNSUPPORTED,
    ChatBody,
    Message,
    SamplingBody,
    Wire,
)
from service.api.tool_schema import CalledFunction, CalledTool, Mode
from service.errors import BadRequest

LOGPROBS = "message.output_text.logprobs"

_PLAIN_TEXT = {"format": {"type": "text"}}
_SHARED = SamplingBody.model_fields.keys()


class InputMessage(Wire):
    """One item of the input: a message, also one that an earlier response put out."""

    type: Literal["message"] | None = Field(None, description="What kind of item it is.")
    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.")
    content: ResponseContent = Field(description="The text, or a list of text parts.")
    id: Text | None = Field(None, description="Accepted for compatibility; has no effect.")
    status: Text | None = Field(None, description="Accepted for compatibility; has no effect.")
    phase: Text | None = Field(None, description="Accepted for compatibility; has no effect.")


Item = Annotated[
    Annotated[InputMessage, Tag("(message)")]
    | Annotated[InputCall, Tag("(function_call)")]
    | Annotated[InputResult, Tag("(function_call_output)")],
    Discriminator(kind_of_item),
]


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


def chat_messages(items: Sequence[InputMessage | InputCall | InputResult]) -> list[Message]:
    """The messages of a chat. Calls, and what was said just before them, are one message."""
    messages: list[Message] = []
    for item in items:
        if isinstance(item, InputMessage):
            messages.append(Message(role=item.role, content=item.content))
        elif isinstance(item, InputResult):
            messages.append(
                Message.model_construct(role="tool", content=item.output, tool_call_id=item.call_id)
            )
        else:
            said, calls = "", []
            if messages and messages[-1].role == "assistant":
                before = messages.pop()
                said, calls = before.content, before.tool_calls or []
            function = CalledFunction.model_construct(name=item.name, arguments=item.arguments)
            call = CalledTool.model_construct(id=item.call_id, type="function", function=function)
            messages.append(
                Message.model_construct(role="assistant", content=said, tool_calls=[*calls, call])
            )
    return messages


def _text_format(body: ResponseBody) -> TextFormat | None:
    return None if body.text is None else body.text.format


def given_back(body: ResponseBody) -> dict[str, Any]:
    """The fields of the body that the response repeats."""
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
