"""The blocks that a message's content is made of, and its tools: wire types, and as a chat's.

    text                          both      text
    thinking, redacted_thinking   assistant its reasoning, of which a chat has the first kind
    tool_use                      assistant a call of a tool
    tool_result                   user      what a call gave: a chat's message of its own

A chat's message has one text, so the texts between two results are joined.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from service.api.fields import FieldError, Label, Text
from service.api.openai.schema import Message
from service.api.tools.schema import (
    CalledFunction,
    CalledTool,
    Function,
    FunctionName,
    FunctionTool,
    Mode,
    Parameters,
    ToolChoice,
    check_json,
)
from service.api.wire import WireModel, content_is_optional, with_assistant_content

MAX_BLOCKS = 1024  # of one message
DIRECT = {"type": "direct"}
_TURN_KINDS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")


def _blocks(value: object, *, kinds: tuple[str, ...]) -> object:
    """A string is one block of text; of other kinds it is said which are known."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise FieldError("invalid_type", "must be a string or a list of blocks")
    if len(value) > MAX_BLOCKS:  # before each of them is looked at
        raise FieldError("array_above_max_length", f"may have at most {MAX_BLOCKS} blocks")
    if any(not isinstance(block, dict) or block.get("type") not in kinds for block in value):
        names = ", ".join(kinds)
        raise FieldError("unsupported_content", f"only blocks of the type {names} are supported")
    return value


def _text_blocks(value: object) -> object:
    return _blocks(value, kinds=("text",))


def _turn_blocks(value: object) -> object:
    return _blocks(value, kinds=_TURN_KINDS)


class Block(WireModel):
    """What all blocks have in common."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({
        "citations": ([],), "caller": (DIRECT,), "toolset_name": (),
    })  # fmt: skip

    cache_control: dict[str, Any] | None = Field(
        None, description="Accepted for compatibility; prefixes are cached without it."
    )


class TextBlock(Block):
    """A part of a message's text."""

    type: Literal["text"] = Field(description="What kind of block it is.")
    text: Text = Field(description="The text.")


TextBlocks = Annotated[
    list[TextBlock],
    BeforeValidator(_text_blocks, json_schema_input_type=str | list[TextBlock]),
]


class ToolUseBlock(Block):
    """A call that the assistant made."""

    type: Literal["tool_use"] = Field(description="What kind of block it is.")
    id: Label = Field(description="What the result names it by.")
    name: FunctionName = Field(description="The tool.")
    input: dict[str, Any] = Field(description="The arguments.")

    @field_validator("input")
    @classmethod
    def _is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_json(value)
        return value


class ThinkingBlock(Block):
    """The assistant's reasoning."""

    type: Literal["thinking"] = Field(description="What kind of block it is.")
    thinking: Text = Field(description="The reasoning, for the chat template.")
    signature: Text | None = Field(None, description="Accepted for compatibility; has no effect.")


class RedactedThinkingBlock(Block):
    """Reasoning that only its own server can read; it has no effect."""

    type: Literal["redacted_thinking"] = Field(description="What kind of block it is.")
    data: Text | None = Field(None, description="Accepted for compatibility; has no effect.")


class ToolResultBlock(Block):
    """What a call gave."""

    type: Literal["tool_result"] = Field(description="What kind of block it is.")
    tool_use_id: Label = Field(description="The call.")
    content: TextBlocks = Field([], description="The result: a text, or blocks of text.")
    is_error: bool | None = Field(
        None, description="Whether the call failed. The model reads the content alone."
    )


Role = Literal["user", "assistant", "tool"]
TurnBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]
_FOREIGN: Mapping[str, tuple[type[Block], ...]] = {
    "user": (ToolUseBlock, ThinkingBlock, RedactedThinkingBlock),
    "assistant": (ToolResultBlock,),
}


class Turn(WireModel):
    """One message of the chat so far."""

    model_config = ConfigDict(json_schema_extra=content_is_optional)

    role: Literal["user", "assistant"] = Field(description="Who speaks.")
    content: Annotated[
        list[TurnBlock],
        BeforeValidator(_turn_blocks, json_schema_input_type=str | list[TurnBlock]),
    ] = Field(description="The text, or a list of blocks. The assistant's may be null.")

    @model_validator(mode="before")
    @classmethod
    def _complete_assistant(cls, value: Any) -> Any:  # noqa: ANN401  # any JSON
        return with_assistant_content(value)

    @field_validator("content")
    @classmethod
    def _each_has_its_own(cls, value: list[TurnBlock], info: ValidationInfo) -> list[TurnBlock]:
        foreign = _FOREIGN.get(info.data.get("role", ""), ())
        if any(isinstance(block, foreign) for block in value):
            message = "holds tool_use and thinking for the assistant, tool_result for the user only"
            raise FieldError("invalid_value", message)
        return value

    @property
    def calls(self) -> bool:
        """Whether it calls tools."""
        return any(isinstance(block, ToolUseBlock) for block in self.content)


class MessageTool(WireModel):
    """A tool that the model may call."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({
        "allowed_callers": (["direct"],), "defer_loading": (False,), "input_examples": ([],),
        "eager_input_streaming": (False, True),
    })  # fmt: skip

    type: Literal["custom"] | None = Field(None, description="Tools of the caller's own only.")
    name: FunctionName = Field(description="What the model calls it by.")
    description: Text | None = Field(None, description="For the model: what it does, and when.")
    input_schema: Parameters = Field(description="The JSON schema of its input, an object.")
    strict: bool | None = Field(
        None, description="Refuse a schema that cannot be followed to the letter. Default false."
    )
    cache_control: dict[str, Any] | None = Field(
        None, description="Accepted for compatibility; prefixes are cached without it."
    )

    def as_function(self) -> FunctionTool:
        """As a chat has it."""
        function = Function.model_construct(
            name=self.name,
            description=self.description,
            parameters=self.input_schema,
            strict=self.strict,
        )
        return FunctionTool.model_construct(type="function", function=function)


_MODES = {"auto": Mode.AUTO, "any": Mode.REQUIRED, "tool": Mode.REQUIRED, "none": Mode.NONE}


class MessageToolChoice(WireModel):
    """Whether the model calls tools, and which."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})

    type: Literal["auto", "any", "tool", "none"] = Field(
        description="As it likes, one at least, the one that is named, or none."
    )
    name: FunctionName | None = Field(
        None, validate_default=True, description="Of the type tool: which one."
    )
    disable_parallel_tool_use: bool | None = Field(None, description="One call at most.")

    @field_validator("name")
    @classmethod
    def _goes_with_its_type(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (info.data.get("type") == "tool") != (value is not None):
            raise FieldError("invalid_value", "goes with the type tool, and it needs one")
        return value

    def as_choice(self) -> ToolChoice:
        """As a chat has it."""
        return ToolChoice(_MODES[self.type], self.name)


def joined(blocks: Sequence[TextBlock]) -> str:
    """The text of blocks of text."""
    return "".join(block.text for block in blocks)


def chat_messages(turn: Turn) -> list[Message]:
    """The messages of a chat that a turn is, in its order."""
    if turn.role == "assistant":
        texts = [block for block in turn.content if isinstance(block, TextBlock)]
        calls = [_called(block) for block in turn.content if isinstance(block, ToolUseBlock)]
        thoughts = [block.thinking for block in turn.content if isinstance(block, ThinkingBlock)]
        fields = {"tool_calls": calls or None, "reasoning_content": "".join(thoughts) or None}
        return [_message("assistant", joined(texts), **fields)]
    return list(_user_messages(turn)) or [_message("user", "")]


def _user_messages(turn: Turn) -> Iterator[Message]:
    texts: list[TextBlock] = []
    for block in turn.content:
        if isinstance(block, ToolResultBlock):
            if texts:
                yield _message("user", joined(texts))
                texts = []
            yield _message("tool", joined(block.content), tool_call_id=block.tool_use_id)
        elif isinstance(block, TextBlock):
            texts.append(block)
    if texts:
        yield _message("user", joined(texts))


def _message(role: Role, content: str, **fields: Any) -> Message:  # noqa: ANN401  # any field
    # Every value was checked where it came from.
    return Message.model_construct(role=role, content=content, **fields)


def _called(block: ToolUseBlock) -> CalledTool:
    arguments = json.dumps(block.input, ensure_ascii=False)
    function = CalledFunction.model_construct(name=block.name, arguments=arguments)
    return CalledTool.model_construct(id=block.id, type="function", function=function)
