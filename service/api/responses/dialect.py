"""OpenAI's responses as a dialect, and how their body becomes the neutral request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from service.api.generation.deltas import Accumulator
from service.api.generation.manifest import Endpoint
from service.api.generation.reader import AnswerReader
from service.api.generation.request import Chat, Generation, sampling_of
from service.api.http.errors import FieldNames, error_body
from service.api.responses.items import (
    AnyCall,
    InputItem,
    InputMessage,
    InputReasoning,
    InputReference,
    InputResult,
    echoed_choice,
)
from service.api.responses.object import response_object, status_of
from service.api.responses.schema import ENCRYPTED, LOGPROBS, ResponseBody
from service.api.responses.stream import ResponseRenderer
from service.api.structured.grammar import json_output
from service.api.tools.chat import (
    ChatMessage,
    Mode,
    ToolUse,
    tool_use,
)
from service.errors import BadRequest

_NAMES = FieldNames(
    prompt="input",
    max_tokens="max_output_tokens",
    logprobs="top_logprobs",
    output="text.format",
    schema="text.format.schema",
    function="tools[{}]",
    parameters="tools[{}].parameters",
)


class Responses:
    """See `Dialect`."""

    name = Endpoint.RESPONSES
    path = "/v1/responses"
    names = _NAMES
    id_headers: Sequence[bytes] = ()

    stream = staticmethod(ResponseRenderer)
    error = staticmethod(error_body)

    def parse(self, body: ResponseBody) -> Generation:
        """Raises BadRequest. For a body that refers to no stored response: see `generation`."""
        items = [item for item in body.input if not isinstance(item, InputReference)]
        return self.generation(body, items, stored_input=None)

    def generation(
        self, body: ResponseBody, items: Sequence[InputItem], *, stored_input: str | None
    ) -> Generation:
        """The request for an answer to these items. Raises BadRequest."""
        _reject_conflicting_fields(body)
        messages = chat_messages(items)
        if body.instructions is not None:
            messages.insert(0, ChatMessage(role="system", content=body.instructions))
        dropped = ", ".join(body.dropped_tools)
        form, output = body.text_format, None
        if form is not None:
            output = json_output(form.type, schema=form.schema_, strict=form.strict, names=_NAMES)
        return Generation(
            model=body.model,
            prompt=Chat(
                messages=tuple(messages),
                tools=_tools(body),
                truncate=body.truncation == "auto",
                effort=None if body.reasoning is None else body.reasoning.effort,
            ),
            sampling=sampling_of(body),
            names=self.names,
            max_tokens=body.max_output_tokens,
            min_tokens=body.min_tokens or 0,
            stop=tuple(body.stop or ()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=body.ignore_eos or False,
            logprobs=(body.top_logprobs or 0) if _with_logprobs(body) else None,
            output=output,
            stream=body.stream or False,
            priority=body.priority,
            on_disconnect="continue" if body.background else body.on_disconnect,
            echoed=_echoed(body),
            sealed_reasoning=ENCRYPTED in (body.include or ()),
            stored_input=stored_input,
            warnings=(f"tools that this server lacks were dropped: {dropped}",) if dropped else (),
        )

    def collect(self, reader: AnswerReader, choices: Sequence[Accumulator]) -> bytes:
        (answer,) = choices
        return orjson.dumps(response_object(reader, answer, status=status_of(answer)))


RESPONSES = Responses()


def _reject_conflicting_fields(body: ResponseBody) -> None:
    if body.background and body.store is False:
        raise BadRequest("background needs store to be true", param="background")
    if body.background and body.on_disconnect == "cancel":
        raise BadRequest("background cannot be combined with cancel", param="on_disconnect")
    if body.top_logprobs and not _with_logprobs(body):
        raise BadRequest(f"top_logprobs needs include to contain {LOGPROBS}", param="top_logprobs")
    if body.own_tools and _with_logprobs(body):
        raise BadRequest("logprobs cannot be combined with tools", param="include")


def _with_logprobs(body: ResponseBody) -> bool:
    return LOGPROBS in (body.include or ())


def _tools(body: ResponseBody) -> ToolUse | None:
    choice = body.tool_choice
    if not body.own_tools and choice is not None and choice.mode is not Mode.REQUIRED:
        choice = None  # clients also send it without tools, to no effect
    return tool_use(
        [tool.definition() for tool in body.own_tools],
        choice=choice,
        parallel=body.parallel_tool_calls is not False,
        names=_NAMES,
    )


def chat_messages(items: Sequence[InputItem]) -> list[ChatMessage]:
    """The messages of a chat. Calls and the assistant's text just before them are one message."""
    messages: list[ChatMessage] = []
    reasoning: str | None = None  # of the next item, if that is the assistant's
    for item in items:
        if isinstance(item, InputReasoning):
            reasoning = item.text
            continue
        if isinstance(item, AnyCall):
            _add_call(messages, item, reasoning)
        else:
            messages.append(_message(item, reasoning))
        reasoning = None
    return messages


def _message(item: InputMessage | InputResult, reasoning: str | None) -> ChatMessage:
    if isinstance(item, InputResult):
        return ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id)
    if item.role != "assistant":
        return ChatMessage(role=item.role, content=item.content)
    reasoning = item.reasoning_content or reasoning
    return ChatMessage(role="assistant", content=item.content, reasoning=reasoning)


def _add_call(messages: list[ChatMessage], item: AnyCall, reasoning: str | None) -> None:
    """Adds a call to the assistant's message before it, or to an empty one."""
    message = ChatMessage(role="assistant", content="")
    if messages and messages[-1].role == "assistant":
        message = messages.pop()
    messages.append(
        replace(
            message,
            reasoning=message.reasoning or reasoning,
            tool_calls=(*message.tool_calls, item.call()),
        )
    )


def _echoed(body: ResponseBody) -> dict[str, Any]:
    """The request fields that the response repeats."""
    return {
        "background": body.background or False,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": body.presence_penalty or 0.0,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": _echoed_reasoning(body),
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": _echoed_text(body),
        "tool_choice": echoed_choice(body.tool_choice),
        "tools": [tool.echoed() for tool in body.own_tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }


def _echoed_reasoning(body: ResponseBody) -> dict[str, Any]:
    asked = body.reasoning
    if asked is None:
        return {"effort": None, "summary": None}
    return {"effort": asked.effort, "summary": asked.summary or asked.generate_summary}


def _echoed_text(body: ResponseBody) -> dict[str, Any]:
    form = {"type": "text"}
    if body.text_format is not None:
        form = body.text_format.model_dump(exclude_none=True)
    verbosity = None if body.text is None else body.text.verbosity
    return {"format": form} if verbosity is None else {"format": form, "verbosity": verbosity}
