"""Tools in the prompt: the input of a chat template if functions may be called, or were.

A template that knows tools renders them itself. Other models get the prompt fallback: functions are
described in the system message, earlier calls are part of the assistant's text in the format that
the model was told, and results are messages of the user.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from service.api.tools.chat import ChatMessage, FunctionDefinition, ToolCall
from service.api.tools.formats import ToolFormat

# The wording is part of the prompt: a change of it changes answers.
_FALLBACK = """\
You can call functions. Each line between <tools> and </tools> describes one, its parameters as a \
JSON schema:
<tools>
{functions}
</tools>

To call a function, answer with its name and its arguments as JSON, like this:
<tool_call>
{{"name": "the name", "arguments": {{"the parameter": "its value"}}}}
</tool_call>
The results will be given to you between <tool_response> and </tool_response>."""
_SYSTEM = frozenset({"system", "developer"})

TemplateInput = tuple[list[dict[str, Any]], dict[str, Any]]


def template_input(
    messages: Sequence[ChatMessage],
    functions: Sequence[FunctionDefinition],
    tool_format: ToolFormat,
) -> TemplateInput:
    """Returns the messages and the variables for the chat template."""
    described = [_described(function) for function in functions]
    if tool_format.native:
        return [_native(message) for message in messages], {"tools": described} if described else {}
    rendered = list(_fallback(messages, tool_format))
    if described:
        _add_descriptions(described, rendered)
    return rendered, {}


def _described(function: FunctionDefinition) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        fields["description"] = function.description
    fields["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": fields}


def _plain(message: ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.reasoning is not None:
        fields["reasoning_content"] = fields["reasoning"] = message.reasoning
    return fields


def _native(message: ChatMessage) -> dict[str, Any]:
    fields = _plain(message)
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [_native_call(call) for call in message.tool_calls]
    return fields


def _native_call(call: ToolCall) -> dict[str, Any]:
    arguments = json.loads(call.arguments)  # templates write the JSON themselves
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _fallback(messages: Sequence[ChatMessage], tool_format: ToolFormat) -> Iterator[dict[str, Any]]:
    for is_result, group in groupby(messages, lambda message: message.role == "tool"):
        if is_result:  # one message: templates may require user and assistant to alternate
            results = [f"<tool_response>\n{m.content}\n</tool_response>" for m in group]
            yield {"role": "user", "content": "\n".join(results)}
        else:
            yield from (_with_calls(message, tool_format) for message in group)


def _with_calls(message: ChatMessage, tool_format: ToolFormat) -> dict[str, Any]:
    fields = _plain(message)
    if message.tool_calls:
        calls = tool_format.render([(call.name, call.arguments) for call in message.tool_calls])
        fields["content"] = f"{message.content}\n{calls}" if message.content else calls
    return fields


def _add_descriptions(described: Sequence[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
    """Appends the functions to the system message, or inserts one."""
    lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in described)
    text = _FALLBACK.format(functions=lines)
    if messages[0]["role"] in _SYSTEM:
        messages[0] = messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}
    else:
        messages.insert(0, {"role": "system", "content": text})
