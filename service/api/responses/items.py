"""Input items of POST /v1/responses: messages, calls, results, reasoning, references.

The items of an earlier response's output are valid input items, too.
"""

from __future__ import annotations

import base64
import binascii
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from service.api.fields import (
    FieldError,
    Ignored,
    Label,
    ResponseContent,
    StrictModel,
    Text,
)
from service.api.tools.schema import FunctionName
from service.api.wire import MAX_MESSAGES, UNSUPPORTED, MessageModel, WireModel

SEALED = "quire1."
"""Begins the `encrypted_content` that this server makes: the reasoning in base64url follows."""


def seal(text: str) -> str:
    """The reasoning as opaque text that a client can send back: encoded, not encrypted."""
    return SEALED + base64.urlsafe_b64encode(text.encode()).decode()


def unseal(sealed: str) -> str | None:
    """The reasoning in an `encrypted_content`; None if another server made it."""
    if not sealed.startswith(SEALED):
        return None
    try:
        return base64.b64decode(sealed[len(SEALED) :], altchars="-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None


class InputMessage(MessageModel):
    """A message, also one of an earlier response's output."""

    unsupported = MappingProxyType({**UNSUPPORTED, "tool_calls": ([],)})

    type: Literal["message"] | None = Field(None, description="The kind of item.")
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="The author of the message."
    )
    content: ResponseContent = Field(
        description="The text, or a list of text parts. The assistant's may be null or empty."
    )
    reasoning_content: Text | None = Field(
        None, description="The assistant's reasoning before the text, for the chat template."
    )
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None

    @field_validator("reasoning_content")
    @classmethod
    def _only_of_the_assistant(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("role", "assistant") != "assistant":
            raise FieldError("invalid_value", "needs the role assistant")
        return value


class ReasoningPart(WireModel):
    """A part of a reasoning item."""

    type: Literal["reasoning_text", "summary_text"] = Field(description="The kind of part.")
    text: Text = Field(description="The text.")


_Parts = Annotated[list[ReasoningPart] | None, Field(max_length=MAX_MESSAGES)]


class InputReasoning(WireModel):
    """The assistant's reasoning before its next message or call."""

    type: Literal["reasoning"] = Field(description="The kind of item.")
    summary: _Parts = Field(None, description="Used if there is nothing else.")
    content: _Parts = Field(None, description="The reasoning, for the chat template.")
    encrypted_content: Text | None = Field(
        None,
        description="The reasoning as this server returned it, used if there is no content. That "
        "of other servers is not readable and has no effect.",
    )
    id: Ignored = None
    status: Ignored = None

    @property
    def text(self) -> str | None:
        """The reasoning; None if it has no text."""
        if not self.content and (text := unseal(self.encrypted_content or "")):
            return text
        return "".join(part.text for part in self.content or self.summary or ()) or None


class InputCall(StrictModel):
    """A tool call of an earlier response."""

    type: Literal["function_call"] = Field(description="The kind of item.")
    call_id: Label = Field(description="The id that the item with the result refers to.")
    name: FunctionName = Field(description="The function.")
    arguments: Text = Field(
        description="The text of a JSON object. One that was cut off is accepted, too."
    )
    id: Ignored = None
    status: Ignored = None


class InputResult(StrictModel):
    """The result of a tool call."""

    type: Literal["function_call_output"] = Field(description="The kind of item.")
    call_id: Label = Field(description="The id of the call.")
    output: ResponseContent = Field(description="The text, or a list of text parts.")
    id: Ignored = None
    status: Ignored = None


class InputCustomCall(StrictModel):
    """A call of a custom tool in an earlier response."""

    type: Literal["custom_tool_call"] = Field(description="The kind of item.")
    call_id: Label = Field(description="The id that the item with the result refers to.")
    name: FunctionName = Field(description="The tool.")
    input: Text = Field(description="Its input.")
    id: Ignored = None
    status: Ignored = None


class InputCustomResult(StrictModel):
    """The result of a custom tool's call."""

    type: Literal["custom_tool_call_output"] = Field(description="The kind of item.")
    call_id: Label = Field(description="The id of the call.")
    output: ResponseContent = Field(description="The text, or a list of text parts.")
    id: Ignored = None
    status: Ignored = None


class InputReference(StrictModel):
    """An item of a stored response, input or output, by its id."""

    type: Literal["item_reference"] | None = Field(None, description="The kind of item.")
    id: Label = Field(description="The id of the item.")


_KINDS = (
    "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output",
    "reasoning", "item_reference",
)  # fmt: skip


def _kind_of_item(item: object) -> str:
    """The tag of the type that an item is validated as."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind is None and isinstance(item, dict) and set(item) - {"type"} == {"id"}:
        kind = "item_reference"  # its type is optional
    return f"({kind})" if kind in _KINDS else "(message)"


AnyCall = InputCall | InputCustomCall
AnyResult = InputResult | InputCustomResult
InputItem = InputMessage | InputReasoning | AnyCall | AnyResult
"""An item that is no reference."""
AnyItem = Annotated[
    Annotated[InputMessage, Tag("(message)")]
    | Annotated[InputReasoning, Tag("(reasoning)")]
    | Annotated[InputCall, Tag("(function_call)")]
    | Annotated[InputResult, Tag("(function_call_output)")]
    | Annotated[InputCustomCall, Tag("(custom_tool_call)")]
    | Annotated[InputCustomResult, Tag("(custom_tool_call_output)")]
    | Annotated[InputReference, Tag("(item_reference)")],
    Discriminator(_kind_of_item),
]


_PREFIXES: dict[type[InputItem], str] = {
    InputMessage: "msg", InputReasoning: "rs", InputCall: "fc", InputResult: "fco",
    InputCustomCall: "ctc", InputCustomResult: "ctco",
}  # fmt: skip


def stored_item(item: InputItem, id_: str) -> dict[str, Any]:
    """An item as it is stored, listed, and read again: with all fields of a returned item."""
    fields: dict[str, Any] = {"status": "completed"}
    if isinstance(item, InputMessage):
        kind = "output_text" if item.role == "assistant" else "input_text"
        part: dict[str, Any] = {"type": kind, "text": item.content}
        if item.role == "assistant":
            part["annotations"] = []
            if item.reasoning_content is not None:
                fields["reasoning_content"] = item.reasoning_content
        fields |= {"type": "message", "role": item.role, "content": [part]}
    elif isinstance(item, InputReasoning):
        parts = [] if item.text is None else [{"type": "reasoning_text", "text": item.text}]
        fields |= {"type": "reasoning", "summary": [], "content": parts}
    else:
        fields |= item.model_dump(exclude={"id", "status"})
    return {"id": f"{_PREFIXES[type(item)]}_{id_}", **fields}
