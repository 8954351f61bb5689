"""The body of POST /v1/responses.

State that is kept on the server, and tools other than functions of the client's, are refused by
name: see `WireModel`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from service.api.answers import AnswerModel, CallId, ModelId
from service.api.fields import (
    FieldError,
    Ignored,
    IgnoredText,
    Label,
    ResponseContent,
    StrictModel,
    Text,
    check_json,
)
from service.api.tools.chat import ToolChoice
from service.api.tools.schema import (
    MAX_TOOLS,
    Function,
    FunctionName,
    Unlisted,
    choice_schema,
    read_tool_choice,
)
from service.api.wire import MAX_MESSAGES, UNSUPPORTED, MessageModel, SamplingBody, WireModel

LOGPROBS = "message.output_text.logprobs"


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
    summary: _Parts = Field(None, description="Used if there is no content.")
    content: _Parts = Field(None, description="The reasoning, for the chat template.")
    encrypted_content: IgnoredText = None
    id: Ignored = None
    status: Ignored = None

    @property
    def text(self) -> str | None:
        """The reasoning; None if it has no text."""
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


_KINDS = ("function_call", "function_call_output", "reasoning")


def _kind_of_item(item: object) -> str:
    """The tag of the type that an item is validated as."""
    kind = item.get("type") if isinstance(item, dict) else None
    return f"({kind})" if kind in _KINDS else "(message)"


def _items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


InputItem = InputMessage | InputReasoning | InputCall | InputResult
_TaggedItem = Annotated[
    Annotated[InputMessage, Tag("(message)")]
    | Annotated[InputReasoning, Tag("(reasoning)")]
    | Annotated[InputCall, Tag("(function_call)")]
    | Annotated[InputResult, Tag("(function_call_output)")],
    Discriminator(_kind_of_item),
]
_Items = Annotated[list[_TaggedItem], Field(min_length=1, max_length=MAX_MESSAGES)]


class _FunctionType(StrictModel):
    type: Literal["function"] = Field(description="The kind of tool.")


class ResponseTool(Function, _FunctionType):  # in this order `type` is the first field
    """A tool. Functions are the only supported kind."""


def _tool_choice(value: object) -> ToolChoice | None:
    return None if value is None else read_tool_choice(value, nested=False)


_Choice = Annotated[
    ToolChoice | None,
    Unlisted,
    PlainValidator(_tool_choice),
    WithJsonSchema(choice_schema(nested=False)),
]


def _json(value: dict[str, Any]) -> dict[str, Any]:
    check_json(value)
    return value


class TextFormat(StrictModel):
    """The format of the text."""

    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Any text, a JSON object, or JSON that matches a schema."
    )
    name: Label | None = Field(None, description="A name for the schema; has no effect.")
    description: Text | None = Field(None, description="What it is for; has no effect.")
    schema_: Annotated[dict[str, Any], AfterValidator(_json)] | None = Field(
        None, alias="schema", description="The schema of the answer; required with json_schema."
    )
    strict: bool | None = Field(
        None,
        description="Reject a schema that cannot be enforced exactly. Default false: the parts "
        "that cannot be enforced are left to the model.",
    )


class TextOptions(StrictModel):
    """Requirements on the text."""

    format: TextFormat | None = Field(
        None, description="Any text, a JSON object, or JSON that matches a schema. Default: text."
    )
    verbosity: None = Field(None, description="Not supported.")


class ResponseBody(SamplingBody):
    """The body of POST /v1/responses."""

    unsupported = MappingProxyType({
        **UNSUPPORTED, "max_tool_calls": (), "previous_response_id": (), "conversation": (),
        "prompt": (), "reasoning": ({}, {"effort": None, "summary": None}), "response_format": (),
        "structured_outputs": (), "truncation": ("disabled",),
        "stream_options": ({}, {"include_obfuscation": False}), "context_management": (),
        "background_options": (), "prompt_cache_retention": (), "prompt_cache_options": (),
        "n": (1,),
    })  # fmt: skip

    input: Annotated[
        list[_TaggedItem], BeforeValidator(_items, json_schema_input_type=str | _Items)
    ] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A text, or the messages, calls and results so far. The server keeps no "
        "conversation: send all of it.",
    )
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum number of output tokens. Default: the rest of the context.",
    )
    background: bool | None = Field(
        None,
        description="Answer at once with a queued response, and generate it without a reader. "
        "Needs store.",
    )
    store: bool | None = Field(
        None, description="Keep the response for a while, to be retrieved by its id. Default true."
    )
    include: list[Literal["message.output_text.logprobs"]] | None = Field(
        None, max_length=8, description="Log probabilities, or nothing."
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        description="Also return this many top log probabilities for each token; needs include.",
    )
    text: TextOptions | None = Field(None, description="Requirements on the text of the answer.")
    tools: Annotated[list[ResponseTool] | None, Field(max_length=MAX_TOOLS)] = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: _Choice = Field(
        None,
        description="none, auto, required, the one tool to call (once), or allowed_tools with a "
        "mode and the tools that may be called. Default auto.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether one response may hold several calls. Default true."
    )

    @property
    def text_format(self) -> TextFormat | None:
        return None if self.text is None else self.text.format


class ResponseObject(AnswerModel):
    """A response in its current state."""

    id: str = Field(description="The id to retrieve it by.")
    object: Literal["response"] = Field(description="The type of this object.")
    created_at: float = Field(description="When the call arrived, in Unix seconds.")
    status: str = Field(
        description="queued, in_progress, completed, incomplete, failed or cancelled."
    )
    model: ModelId
    output: list[dict[str, Any]] = Field(description="Messages and tool calls of the assistant.")


class ResponseDeleted(AnswerModel):
    """Confirms that a response was deleted."""

    id: CallId
    object: Literal["response"] = Field(description="The type of the deleted object.")
    deleted: Literal[True] = Field(description="Always true.")
