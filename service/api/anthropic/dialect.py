"""Anthropic's messages as a dialect, and how their bodies become the neutral request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import orjson

from service.api.anthropic.object import message_error_body, message_object
from service.api.anthropic.schema import (
    CountBody,
    MessageBody,
    MessageTool,
    MessageToolChoice,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
    TurnBlock,
)
from service.api.anthropic.stream import MessageRenderer
from service.api.fields import FieldNames
from service.api.generation.accumulate import Accumulator
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader
from service.api.generation.request import Chat, Generation
from service.api.generation.sampling import sampling_of
from service.api.structured.output import JsonOutput
from service.api.tools.chat import (
    ChatMessage,
    FunctionDefinition,
    Mode,
    ToolCall,
    ToolChoice,
    ToolRef,
    tool_use,
)
from service.errors import BadRequest

_NAMES = FieldNames(
    prompt="messages",
    stop="stop_sequences",
    output="output_config.format",
    schema="output_config.format.schema",
    function="tools[{}]",
    parameters="tools[{}].input_schema",
)
_MODES = {"auto": Mode.AUTO, "any": Mode.REQUIRED, "tool": Mode.REQUIRED, "none": Mode.NONE}


class Messages:
    """See `Dialect`."""

    name = Endpoint.MESSAGES
    path = "/v1/messages"
    names = _NAMES
    id_headers: Sequence[bytes] = (b"request-id",)

    stream = staticmethod(MessageRenderer)
    error = staticmethod(message_error_body)

    def parse(self, body: MessageBody) -> Generation:
        """Raises BadRequest."""
        config, output = body.output_config, None
        if config is not None and config.format is not None:
            output = JsonOutput(schema=config.format.schema_, strict=True)
        return Generation(
            model=body.model,
            prompt=parse_chat(body),
            sampling=sampling_of(body),
            names=self.names,
            max_tokens=body.max_tokens,
            stop=tuple(body.stop_sequences or ()),
            output=output,
            stream=body.stream or False,
            priority=body.priority,
            on_disconnect=body.on_disconnect,
        )

    def collect(self, reader: AnswerReader, choices: Sequence[Accumulator]) -> bytes:
        (answer,) = choices
        return orjson.dumps(message_object(reader, answer))


MESSAGES = Messages()


def parse_chat(body: CountBody) -> Chat:
    """The chat that the prompt is made of. Raises BadRequest."""
    last = body.messages[-1]
    if any(isinstance(block, ToolUseBlock) for block in last.content):
        raise BadRequest(
            "the last message must not call tools: no result follows", param="messages"
        )
    messages = [message for turn in body.messages for message in chat_messages(turn)]
    if body.system:
        messages.insert(0, ChatMessage(role="system", content=_text(body.system)))
    choice = body.tool_choice
    return Chat(
        messages=tuple(messages),
        tools=tool_use(
            [_function(tool) for tool in body.tools or ()],
            choice=None if choice is None else _tool_choice(choice),
            parallel=not (choice and choice.disable_parallel_tool_use),
            names=_NAMES,
        ),
        continue_final_message=last.role == "assistant",
    )


def _tool_choice(choice: MessageToolChoice) -> ToolChoice:
    tool = None if choice.name is None else ToolRef(choice.name)
    return ToolChoice(_MODES[choice.type], tool)


def _function(tool: MessageTool) -> FunctionDefinition:
    return FunctionDefinition(
        name=tool.name,
        description=tool.description,
        parameters=tool.input_schema,
        strict=tool.strict or False,
    )


def chat_messages(turn: Turn) -> list[ChatMessage]:
    """The messages of one turn, in order. A message has one text, so the texts between two tool
    results are joined.
    """
    if turn.role == "user":
        return list(_user_messages(turn.content)) or [ChatMessage(role="user", content="")]
    thoughts = [block.thinking for block in turn.content if isinstance(block, ThinkingBlock)]
    calls = [
        ToolCall(
            id=block.id, name=block.name, arguments=json.dumps(block.input, ensure_ascii=False)
        )
        for block in turn.content
        if isinstance(block, ToolUseBlock)
    ]
    return [
        ChatMessage(
            role="assistant",
            content=_text(turn.content),
            reasoning="".join(thoughts) or None,
            tool_calls=tuple(calls),
        )
    ]


def _user_messages(blocks: Iterable[TurnBlock]) -> Iterator[ChatMessage]:
    texts: list[TurnBlock] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            if texts:
                yield ChatMessage(role="user", content=_text(texts))
                texts = []
            text = _text(block.content)
            yield ChatMessage(role="tool", content=text, tool_call_id=block.tool_use_id)
        else:
            texts.append(block)
    if texts:
        yield ChatMessage(role="user", content=_text(texts))


def _text(blocks: Iterable[TurnBlock]) -> str:
    return "".join(block.text for block in blocks if isinstance(block, TextBlock))
