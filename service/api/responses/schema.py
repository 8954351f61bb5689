"""The body of POST /v1/responses, and what describes its answers.

Conversations, prompt templates and other state of OpenAI's platform are refused by name: see
`WireModel`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from service.api.generation.request import Effort
from service.api.http.fields import NO_EFFECT, Label, OptionalModel, Text, check_json
from service.api.http.models import (
    MAX_MESSAGES,
    UNSUPPORTED,
    AnswerModel,
    CallId,
    ModelId,
    SamplingBody,
    StrictModel,
)
from service.api.responses.items import (
    AnyItem,
    AnyTool,
    Choice,
    HostedTool,
    ResponseCustomTool,
    ResponseTool,
)
from service.api.tools.schema import MAX_TOOLS

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"

Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
Summary = Literal["auto", "concise", "detailed"]


def _json(value: dict[str, Any]) -> dict[str, Any]:
    check_json(value)
    return value


def _items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_Items = Annotated[list[AnyItem], Field(min_length=1, max_length=MAX_MESSAGES)]
_Json = Annotated[dict[str, Any], AfterValidator(_json)]


class TextFormat(StrictModel):
    """The format of the text."""

    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Any text, a JSON object, or JSON that matches a schema."
    )
    name: Label | None = Field(None, description="A name for the schema; has no effect.")
    description: Text | None = Field(None, description="What it is for; has no effect.")
    schema_: _Json | None = Field(
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
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description=NO_EFFECT)


class ReasoningOptions(StrictModel):
    """How the model reasons, and what is returned of it."""

    effort: Effort | None = Field(
        None,
        description="none and minimal switch thinking off, if the chat template can; other values "
        "have an effect on templates with grades of thinking.",
    )
    summary: Summary | None = Field(
        None, description="Return the reasoning as a summary, too: all of its text."
    )
    generate_summary: Summary | None = Field(None, description="The former name of summary.")
    context: Literal["auto"] | None = Field(None, description=NO_EFFECT)
    mode: Literal["standard"] | None = Field(None, description=NO_EFFECT)


class ResponseStreamOptions(StrictModel):
    """Options of the stream."""

    include_obfuscation: bool | None = Field(
        None, description="Accepted for compatibility; events are never padded."
    )


class ResponseBody(SamplingBody):
    """The body of POST /v1/responses."""

    unsupported = MappingProxyType({
        **UNSUPPORTED, "conversation": (), "prompt": (), "response_format": (),
        "structured_outputs": (), "context_management": (), "background_options": (),
        "prompt_cache_options": (), "n": (1,),
    })  # fmt: skip

    model: OptionalModel = None  # type: ignore[assignment]  # required elsewhere
    input: Annotated[
        list[AnyItem], BeforeValidator(_items, json_schema_input_type=str | _Items)
    ] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A text, or messages, calls and results: all so far or, with "
        "previous_response_id, the new ones.",
    )
    previous_response_id: Label | None = Field(
        None,
        description="Continue after this stored response: its input and output come before the "
        "input.",
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None,
        description="auto drops the oldest turns of an input that exceeds the context; disabled, "
        "the default, rejects it.",
    )
    instructions: Text | None = Field(
        None, description="A system message before the input; not kept for later responses."
    )
    max_output_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum number of output tokens. Default: the rest of the context.",
    )
    max_tool_calls: int | None = Field(
        None, ge=1, description="Limits calls of hosted tools only; there are none."
    )
    background: bool | None = Field(
        None,
        description="Answer at once with a queued response, and generate it without a reader. "
        "Needs store.",
    )
    store: bool | None = Field(
        None,
        description="Keep response and input for --keep-responses, to be retrieved, continued and "
        "referred to. Default true.",
    )
    include: list[Include] | None = Field(
        None,
        max_length=16,
        description="Log probabilities of the text; reasoning encoded for input without store; "
        "the outputs of hosted tools have no effect.",
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        description="Also return this many top log probabilities for each token; needs include.",
    )
    text: TextOptions | None = Field(None, description="Requirements on the text of the answer.")
    reasoning: ReasoningOptions | None = Field(
        None, description="How the model reasons, and what is returned of it."
    )
    tools: Annotated[list[AnyTool] | None, Field(max_length=MAX_TOOLS)] = Field(
        None,
        description="Functions and custom tools that the model may call. OpenAI's hosted ones are "
        "dropped; x-quire-warning names them.",
    )
    tool_choice: Choice = Field(
        None,
        description="none, auto, required, the one tool to call (once), or allowed_tools with a "
        "mode and the tools that may be called. Default auto.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether one response may hold several calls. Default true."
    )
    stream_options: ResponseStreamOptions | None = Field(None, description="Options of the stream.")
    service_tier: Literal["auto", "default", "flex", "priority", "fast", "scale"] | None = Field(
        None, description="Accepted for compatibility; there is one tier, default."
    )
    safety_identifier: Label | None = Field(None, description="Returned; has no other effect.")
    prompt_cache_key: Label | None = Field(
        None, description="Returned; prefixes are cached without it."
    )
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = Field(
        None, description=NO_EFFECT
    )
    client_metadata: _Json | None = Field(None, description=NO_EFFECT)

    @property
    def text_format(self) -> TextFormat | None:
        return None if self.text is None else self.text.format

    @property
    def own_tools(self) -> list[ResponseTool | ResponseCustomTool]:
        """The tools without those that are dropped."""
        return [tool for tool in self.tools or () if not isinstance(tool, HostedTool)]

    @property
    def dropped_tools(self) -> list[str]:
        """The types of the tools that this server lacks."""
        return sorted({tool.type for tool in self.tools or () if isinstance(tool, HostedTool)})


class ResponseObject(AnswerModel):
    """A response in its current state."""

    id: str = Field(description="The id to retrieve it by.")
    object: Literal["response"] = Field(description="The type of this object.")
    created_at: float = Field(description="When the call arrived, in Unix seconds.")
    status: str = Field(
        description="queued, in_progress, completed, incomplete, failed or cancelled."
    )
    model: ModelId
    output: list[dict[str, Any]] = Field(
        description="Reasoning, messages and tool calls of the assistant."
    )


class ResponseInputItems(AnswerModel):
    """A page of the input items of a response."""

    object: Literal["list"] = Field(description="The type of this object.")
    data: list[dict[str, Any]] = Field(description="The items.")
    first_id: str | None = Field(description="The id of the first item.")
    last_id: str | None = Field(description="The id of the last item, to be sent as after.")
    has_more: bool = Field(description="Whether more items follow.")


class ResponseDeleted(AnswerModel):
    """Confirms that a response was deleted."""

    id: CallId
    object: Literal["response"] = Field(description="The type of the deleted object.")
    deleted: Literal[True] = Field(description="Always true.")
