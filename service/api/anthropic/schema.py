"""The body of POST /v1/messages, and the chat that it asks for.

A message is a chat with Anthropic's names: `as_chat` is where the names end, so that prompt, limits
and sampling are decided by the same code. What is beside text and tools is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from service.api.anthropic.blocks import (
    MessageTool,
    MessageToolChoice,
    TextBlocks,
    Turn,
    chat_messages,
    joined,
)
from service.api.fields import Label, ModelName, Seed, StopStrings, TopP, UnitTemperature
from service.api.generation.manifest import Endpoint
from service.api.openai.schema import ChatBody, Message
from service.api.structured.schema import JsonSchema, ResponseFormat
from service.api.tools.schema import MAX_TOOLS
from service.api.wire import MAX_MESSAGES, MAX_PRIORITY, MAX_TOP_K, WireModel
from service.errors import BadRequest

_THINKING_OFF = ({"type": "disabled"},)
_SHARED_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "thinking": _THINKING_OFF,
    "output_format": (),
    "speed": ("standard",),
    "context_management": (),
    "mcp_servers": ([],),
    "user_profile_id": (),
    "workspace_id": (),
}


class MessageMetadata(WireModel):
    """What a caller says of a call."""

    user_id: Label | None = Field(None, description="Accepted for compatibility; has no effect.")


class OutputFormat(WireModel):
    """What the text must be."""

    model_config = ConfigDict(serialize_by_alias=True)
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})

    type: Literal["json_schema"] = Field(description="JSON of a schema.")
    schema_: dict[str, Any] = Field(alias="schema", description="The schema.")

    def as_response_format(self) -> ResponseFormat:
        """In a chat's words."""
        schema = JsonSchema.model_construct(schema_=self.schema_, strict=True)
        return ResponseFormat.model_construct(type=self.type, json_schema=schema)


class OutputConfig(WireModel):
    """How the answer must be."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"effort": ()})

    format: OutputFormat | None = Field(None, description="What the text must be. Default: free.")


class CountBody(WireModel):
    """The body of POST /v1/messages/count_tokens: what becomes the prompt of a message."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(_SHARED_UNSUPPORTED)

    model: ModelName = Field(description="The id of the model, as /v1/models lists it.")
    messages: list[Turn] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The chat so far. Where the assistant speaks last, the answer goes on with it.",
    )
    system: TextBlocks | None = Field(None, description="What the model is told before the chat.")
    tools: list[MessageTool] | None = Field(
        None, max_length=MAX_TOOLS, description="Tools that the model may call."
    )
    tool_choice: MessageToolChoice | None = Field(
        None, description="Whether it calls them, and which. Default: as it likes."
    )
    output_config: OutputConfig | None = Field(None, description="How the answer must be.")
    cache_control: dict[str, Any] | None = Field(
        None, description="Accepted for compatibility; prefixes are cached without it."
    )


class MessageBody(CountBody):
    """The body of POST /v1/messages."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            **_SHARED_UNSUPPORTED,
            "container": (),
            "diagnostics": (),
            "inference_geo": (),
            "service_tier": ("auto", "standard_only"),
        }
    )

    max_tokens: int = Field(ge=1, description="The most tokens to generate.")
    temperature: UnitTemperature = Field(
        None, description="0 is greedy; 1 samples from the model's own distribution. Default 1."
    )
    top_p: TopP = Field(
        None, description="Sample from the likeliest tokens that hold this much probability."
    )
    top_k: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_K,
        description="Sample from the k likeliest tokens only; 0: from all.",
    )
    stop_sequences: StopStrings = Field(
        None, description="Strings that end the answer; they are not part of it."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    metadata: MessageMetadata | None = Field(None, description="About the call.")
    seed: Seed = Field(
        None, description="The same seed gives the same answer. Without it one is drawn."
    )
    priority: int | None = Field(
        None, ge=0, le=MAX_PRIORITY, description="0 goes before 1 before 2. Default 1."
    )
    on_disconnect: Literal["cancel", "continue"] | None = Field(
        None, description="What becomes of the answer when the connection is lost."
    )


class MessageChat(ChatBody):
    """A chat whose faults are told in a message's names, and whose answer has a message's shape."""

    endpoint: ClassVar[Endpoint] = Endpoint.MESSAGES
    limit_field: ClassVar[str] = "max_tokens"
    stop_field: ClassVar[str] = "stop_sequences"
    function_field: ClassVar[str] = "tools[{}]"
    parameters_field: ClassVar[str] = "tools[{}].input_schema"
    format_field: ClassVar[str] = "output_config.format"
    schema_field: ClassVar[str] = "output_config.format.schema"


def as_chat(body: MessageBody) -> MessageChat:
    """The chat that a message asks for. Raises BadRequest."""
    config = body.output_config
    form = None if config is None or config.format is None else config.format.as_response_format()
    # Every value was checked where it came from.
    return MessageChat.model_construct(
        **_prompt_fields(body),
        model=body.model,
        max_completion_tokens=body.max_tokens,
        response_format=form,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        stream=body.stream,
        seed=body.seed,
        priority=body.priority,
        on_disconnect=body.on_disconnect,
    )


def as_prompt(body: CountBody) -> MessageChat:
    """As much of the chat as becomes its prompt. Raises BadRequest."""
    return MessageChat.model_construct(**_prompt_fields(body), model=body.model)


def _prompt_fields(body: CountBody) -> dict[str, Any]:
    last = body.messages[-1]
    if last.calls:
        raise BadRequest("the last message may not call tools: it has no result", param="messages")
    messages = [message for turn in body.messages for message in chat_messages(turn)]
    if body.system:
        messages.insert(0, Message.model_construct(role="system", content=joined(body.system)))
    choice = body.tool_choice
    return {
        "messages": messages,
        "continue_final_message": last.role == "assistant",
        "tools": [tool.as_function() for tool in body.tools or ()],
        "tool_choice": None if choice is None else choice.as_choice(),
        "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
    }
