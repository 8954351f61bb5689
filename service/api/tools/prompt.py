"""Tools in the prompt: what a chat template is given where functions may be called, or were.

A template that knows tools renders them itself. For all others they are put into words: the
functions into the system message, earlier calls into the assistant's own text, as it wrote them,
and results into messages of the user.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from service.api.openai.schema import Message
from service.api.tools.formats import ToolFormat
from service.api.tools.schema import CalledTool, Function

_WORDS = """\
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

Rendered = tuple[list[dict[str, Any]], dict[str, Any]]


def with_tools(
    messages: Sequence[Message], functions: Sequence[Function], notation: ToolFormat
) -> Rendered:
    """The messages and the variables for the chat template."""
    described = [_described(function) for function in functions]
    if notation.native:
        return [_native(message) for message in messages], {"tools": described} if described else {}
    worded = list(_in_words(messages, notation))
    if described:
        _tell_of(described, worded)
    return worded, {}


def _described(function: Function) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        fields["description"] = function.description
    fields["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": fields}


def _plain(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.reasoning_content is not None:
        fields["reasoning_content"] = message.reasoning_content
    return fields


def _native(message: Message) -> dict[str, Any]:
    fields = _plain(message)
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls is not None:
        fields["tool_calls"] = [_native_call(call) for call in message.tool_calls]
    return fields


def _native_call(call: CalledTool) -> dict[str, Any]:
    arguments = json.loads(call.function.arguments)  # templates write the JSON themselves
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _in_words(messages: Sequence[Message], notation: ToolFormat) -> Iterator[dict[str, Any]]:
    for is_result, group in groupby(messages, lambda message: message.role == "tool"):
        if is_result:  # one message: templates may want the user and the assistant to take turns
            results = [f"<tool_response>\n{m.content}\n</tool_response>" for m in group]
            yield {"role": "user", "content": "\n".join(results)}
        else:
            yield from (_with_calls(message, notation) for message in group)


def _with_calls(message: Message, notation: ToolFormat) -> dict[str, Any]:
    fields = _plain(message)
    if message.tool_calls is not None:
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
        said = f"{message.content}\n" if message.content else ""
        fields["content"] = said + notation.spell(calls)
    return fields


def _tell_of(described: Sequence[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
    """Puts the functions behind what the system message says, or into one of their own."""
    lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in described)
    words = _WORDS.format(functions=lines)
    if messages[0]["role"] in _SYSTEM:
        content = f"{messages[0]['content']}\n\n{words}"
        messages[0] = messages[0] | {"content": content}
    else:
        messages.insert(0, {"role": "system", "content": words})
