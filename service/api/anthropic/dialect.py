"""Anthropic's messages: the dialect, how bodies become the neutral request, and the route."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import orjson
from fastapi import APIRouter, Response

from service.api.anthropic.answer import MessageRenderer, message_error_body, message_object
from service.api.anthropic.blocks import (
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
    TurnBlock,
)
from service.api.anthropic.schema import (
    AnthropicMessage,
    BoundedThinking,
    ClearThinking,
    CountBody,
    MessageBody,
    MessageCount,
    MessageErrorBody,
)
from service.api.anthropic.tools import HostedTool, MessageToolChoice
from service.api.generation.deltas import Accumulator
from service.api.generation.manifest import Endpoint
from service.api.generation.prompts import render_chat
from service.api.generation.reader import AnswerReader
from service.api.generation.request import Chat, Generation, sampling_of
from service.api.generation.submit import answer
from service.api.http.body import JsonRoute
from service.api.http.context import Caller, Context, JsonRequest
from service.api.http.errors import FieldNames
from service.api.http.models import described, json_response, refused
from service.api.structured.grammar import JsonOutput
from service.api.tools.chat import ChatMessage, Mode, ToolCall, ToolChoice, ToolRef, tool_use
from service.errors import BadRequest

_NAMES = FieldNames(
    prompt="messages",
    stop="stop_sequences",
    output="output_config.format",
    schema="output_config.format.schema",
    function="tools[{}]",
    parameters="tools[{}].input_schema",
)
_CLIENT_NOTE = "x-anthropic-billing-header:"
"""Claude Code's first system block. It differs from chat to chat, so that no prefix would be found
in the cache, and is not meant for the model.
"""
_MODES = {"any": Mode.REQUIRED, "tool": Mode.REQUIRED, "none": Mode.NONE}


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
        config, thinking = body.output_config, body.thinking
        form = body.output_format or (config and config.format)
        bounded = thinking if isinstance(thinking, BoundedThinking) else None
        return Generation(
            model=body.model,
            prompt=parse_chat(body),
            sampling=sampling_of(body),
            names=self.names,
            default_max_tokens=body.max_tokens,  # may exceed the rest of the context
            stop=tuple(body.stop_sequences or ()),
            thinking_budget=bounded.budget_tokens if bounded else None,
            include_reasoning=thinking is None or thinking.shown,
            output=JsonOutput(schema=form.schema_, strict=True) if form else None,
            stream=body.stream or False,
            priority=body.priority,
            on_disconnect=body.on_disconnect,
            warnings=tuple(_warnings(body)),
        )

    def collect(self, reader: AnswerReader, choices: Sequence[Accumulator]) -> bytes:
        (answer,) = choices
        return orjson.dumps(message_object(reader, answer))


MESSAGES = Messages()


def parse_chat(body: CountBody) -> Chat:
    """The chat that the prompt is made of. Raises BadRequest."""
    last = body.messages[-1]
    if any(isinstance(block, ToolUseBlock) for block in last.content):
        message = "the last message must not call tools: no result follows"
        raise BadRequest(message, param="messages")
    messages = [message for turn in _visible(body) for message in chat_messages(turn)]
    system = [block for block in body.system or () if not block.text.startswith(_CLIENT_NOTE)]
    if system:
        messages.insert(0, ChatMessage(role="system", content=_text(system)))
    functions = [tool.definition() for tool in body.tools or () if not isinstance(tool, HostedTool)]
    choice, config = body.tool_choice, body.output_config
    return Chat(
        messages=tuple(messages),
        tools=tool_use(
            functions,
            choice=_tool_choice(choice),
            parallel=not (choice and choice.disable_parallel_tool_use),
            names=_NAMES,
        ),
        continue_final_message=last.role == "assistant",
        thinking=None if body.thinking is None else body.thinking.type != "disabled",
        effort=config.effort if config else None,
    )


def _warnings(body: MessageBody) -> Iterator[str]:
    """The known parts of the body that have no effect."""
    for index, tool in enumerate(body.tools or ()):
        if isinstance(tool, HostedTool):
            yield f"tools[{index}] is left out: this server runs no tools of its own"
    edits = body.context_management.edits if body.context_management else ()
    for index, edit in enumerate(edits):
        if not isinstance(edit, ClearThinking):
            yield f"context_management.edits[{index}] has no effect on this server"


def _tool_choice(choice: MessageToolChoice | None) -> ToolChoice | None:
    """None stands for auto, which is no error without tools: all may have been left out."""
    if choice is None or choice.type == "auto":
        return None
    tool = None if choice.name is None else ToolRef(choice.name)
    return ToolChoice(_MODES[choice.type], tool)


def _visible(body: CountBody) -> Iterator[Turn]:
    """The messages as the model gets them: without the system messages that later ones hide, and
    without reasoning that the body asks to remove.
    """
    turns = body.messages
    last_user = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
    thinking = [i for i, turn in enumerate(turns) if any(map(_is_thinking, turn.content))]
    kept = _kept_thinking(body)
    cleared = set() if kept is None else set(thinking[:-kept])
    for index, turn in enumerate(turns):
        if turn.clear_at == "next_user_message" and index < last_user:
            continue
        if index not in cleared:
            yield turn
        else:
            content = [block for block in turn.content if not _is_thinking(block)]
            yield turn.model_copy(update={"content": content})


def _kept_thinking(body: CountBody) -> int | None:
    """How many messages keep their reasoning; None: all."""
    edits = body.context_management.edits if body.context_management else ()
    kept = [edit.kept for edit in edits if isinstance(edit, ClearThinking)]
    return min((number for number in kept if number is not None), default=None)


def _is_thinking(block: TurnBlock) -> bool:
    return isinstance(block, ThinkingBlock)


def chat_messages(turn: Turn) -> list[ChatMessage]:
    """The messages of one turn, in order. A message has one text, so the texts between two tool
    results are joined.
    """
    if turn.role == "system":
        return [ChatMessage(role="system", content=_text(turn.content))]
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


router = APIRouter(route_class=JsonRoute, responses=refused(MessageErrorBody))


@router.post("/v1/messages", responses=described(AnthropicMessage, stream=True))
async def create_message(
    body: MessageBody, request: JsonRequest, context: Context, tenant: Caller
) -> Response:
    """Answers a chat in the form of Anthropic's API, errors included. With `stream` the answer
    comes as server-sent events; its `x-request-id` identifies it to be resumed or cancelled.
    """
    return await answer(MESSAGES, body, request, context, tenant)


@router.post("/v1/messages/count_tokens", responses=described(MessageCount))
async def count_tokens(body: CountBody, context: Context, tenant: Caller) -> Response:
    """Returns the number of tokens of a message's prompt."""
    chosen = context.model(body.model)
    chat, names = parse_chat(body), MESSAGES.names
    prompt = await render_chat(chat, chosen, tenant=tenant.name, names=names)
    return json_response({"input_tokens": len(prompt.ids)})
