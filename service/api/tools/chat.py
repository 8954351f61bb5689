"""A chat and its tools in no dialect's terms, and as the input of a chat template.

A *custom* tool takes a text, its input, instead of arguments. The model sees it as a function with
one parameter, `input`, and the parser of its calls returns the text.

A template that knows tools renders them itself, in the shapes that `CallRendering` found. A
template that renders calls but no tools gets their descriptions in the system message. Other models
get the prompt fallback: earlier calls are part of the assistant's text in the format that the model
was told, and results are messages of the user.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, Literal

from model.text.template_calls import CallRendering
from service.api.http.errors import FieldNames
from service.api.http.fields import check_json
from service.api.tools.arguments import INPUT
from service.api.tools.formats import ToolFormat
from service.errors import BadRequest

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call in an earlier message of the assistant."""

    id: str  # the message with the result names it
    name: str
    arguments: str  # the text of a JSON object, also incomplete; of a custom tool: its input
    custom: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message, as the chat template gets it."""

    role: Role
    content: str
    name: str | None = None
    reasoning: str | None = None  # of the assistant, before the text
    tool_calls: tuple[ToolCall, ...] = ()  # of the assistant
    tool_call_id: str | None = None  # of a tool's message: the call that it answers


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFormat:
    """What the input of a custom tool must match."""

    syntax: Literal["lark", "regex"]
    definition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionDefinition:
    """A function or a custom tool that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema of an object; None: no arguments
    strict: bool = False  # an inexpressible schema is an error
    custom: bool = False  # takes a text; `parameters` and `strict` do not apply
    input_format: InputFormat | None = None  # of a custom tool; None: any text

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the arguments, as the model sees it."""
        if self.custom:
            text = {"type": "string"}
            return {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
        return self.parameters or {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of a chat whose `tool_choice` is not "none"."""

    functions: tuple[FunctionDefinition, ...]  # described in the prompt
    may_call: tuple[int, ...]  # indices of those that the model may call
    forced: bool  # the output must be calls, without other text
    parallel: bool  # several calls are allowed; false if the choice names one tool


class Mode(StrEnum):
    """Whether the model calls functions."""

    NONE = "none"
    AUTO = "auto"  # the model decides
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolRef:
    """A tool that a choice names."""

    name: str
    custom: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`tool_choice`: a mode, and the tools that it is about."""

    mode: Mode
    tool: ToolRef | None = None  # the one tool that must be called, once
    allowed: tuple[ToolRef, ...] | None = None  # those that may be called; None: all


def tool_use(
    functions: Sequence[FunctionDefinition],
    *,
    choice: ToolChoice | None,
    parallel: bool,
    names: FieldNames,
) -> ToolUse | None:
    """Returns None if the output is text only. Raises BadRequest."""
    if not functions:
        if choice is not None and choice.mode is not Mode.NONE:
            raise BadRequest("tool_choice needs tools", param="tool_choice")
        return None
    choice = choice or ToolChoice(Mode.AUTO)
    tools = [ToolRef(function.name, function.custom) for function in functions]
    for index, tool in enumerate(tools):
        if any(tool.name == earlier.name for earlier in tools[:index]):
            param = f"{names.function.format(index)}.name"
            raise BadRequest("tool names must be unique", param=param)
    allowed = choice.allowed if choice.tool is None else (choice.tool,)
    if allowed is not None and not set(allowed) <= set(tools):
        raise BadRequest("tool_choice names a tool that is not in tools", param="tool_choice")
    if choice.mode is Mode.NONE:
        return None
    return ToolUse(
        functions=tuple(functions),
        may_call=tuple(i for i, tool in enumerate(tools) if allowed is None or tool in allowed),
        forced=choice.mode is Mode.REQUIRED,
        parallel=parallel and choice.tool is None,
    )


# The wording is part of the prompt: a change of it changes answers.
_DESCRIPTIONS = """\
You can call functions. Each line between <tools> and </tools> describes one, its parameters as a \
JSON schema:
<tools>
{functions}
</tools>

To call a function, answer with its name and its arguments as JSON, like this:
{example}
The results will be given to you{results}."""
_RESULTS = " between <tool_response> and </tool_response>"
_EXAMPLE = ("the name", '{"the parameter": "its value"}')
_GRAMMARS = {"lark": "Lark grammar", "regex": "regular expression"}
_SYSTEM = frozenset({"system", "developer"})

TemplateInput = tuple[list[dict[str, Any]], dict[str, Any]]


def template_input(
    messages: Sequence[ChatMessage],
    functions: Sequence[FunctionDefinition],
    tool_format: ToolFormat,
    rendering: CallRendering,
) -> TemplateInput:
    """Returns the messages and the variables for the chat template."""
    described = [_described(function) for function in functions]
    if tool_format.native:
        rendered = [fields for message in messages for fields in _native(message, rendering)]
        if rendering.lists_tools:
            return rendered, {"tools": described} if described else {}
    else:
        rendered = list(_fallback(messages, tool_format))
    if described:
        _add_descriptions(described, rendered, tool_format)
    return rendered, {}


def _described(function: FunctionDefinition) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": function.name}
    description = function.description
    if function.input_format is not None:
        form = function.input_format
        rule = f"The input must match this {_GRAMMARS[form.syntax]}:\n{form.definition}"
        description = rule if description is None else f"{description}\n\n{rule}"
    if description is not None:
        fields["description"] = description
    fields["parameters"] = function.schema
    return {"type": "function", "function": fields}


def _plain(message: ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.reasoning is not None:
        fields["reasoning_content"] = fields["reasoning"] = message.reasoning
    return fields


def _native(message: ChatMessage, rendering: CallRendering) -> Iterator[dict[str, Any]]:
    fields = _plain(message)
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        if not message.content:
            fields["content"] = rendering.empty
        elif not rendering.takes_content:
            yield dict(fields)
            fields = {"role": message.role, "content": rendering.empty}
        fields["tool_calls"] = [_native_call(call, rendering) for call in message.tool_calls]
    yield fields


def _native_call(call: ToolCall, rendering: CallRendering) -> dict[str, Any]:
    function = {"name": call.name, "arguments": _arguments(call, rendering)}
    return {"id": call.id, "type": "function", "function": function}


def _arguments(call: ToolCall, rendering: CallRendering) -> dict[str, Any] | str:
    """In the shape that the template takes. Text that is no JSON object, because the call was cut
    off, stays text if the template writes text as it is; else it becomes the only argument.
    """
    text = _as_json(call)
    given = parsed_arguments(text)
    if not rendering.takes_objects or (given is None and rendering.takes_text):
        return text
    return {"arguments": call.arguments} if given is None else given


def _as_json(call: ToolCall) -> str:
    if call.custom:
        return json.dumps({INPUT: call.arguments}, ensure_ascii=False)
    return call.arguments if call.arguments.strip() else "{}"


def parsed_arguments(text: str) -> dict[str, Any] | None:
    """None if the text is no JSON object, or one that JSON text cannot repeat."""
    try:
        parsed = json.loads(text)
        check_json(parsed)
    except (ValueError, RecursionError):  # a FieldError is a ValueError
        return None
    return parsed if isinstance(parsed, dict) else None


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
        calls = tool_format.render([(call.name, _as_json(call)) for call in message.tool_calls])
        fields["content"] = f"{message.content}\n{calls}" if message.content else calls
    return fields


def _add_descriptions(
    described: Sequence[dict[str, Any]], messages: list[dict[str, Any]], tool_format: ToolFormat
) -> None:
    """Appends the functions to the system message, or inserts one."""
    text = _DESCRIPTIONS.format(
        functions="\n".join(json.dumps(function, ensure_ascii=False) for function in described),
        example=tool_format.render([_EXAMPLE]),
        results="" if tool_format.native else _RESULTS,
    )
    if messages[0]["role"] in _SYSTEM:
        messages[0] = messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}
    else:
        messages.insert(0, {"role": "system", "content": text})
