"""The grammar of an output that may call functions, in llguidance's dialect of Lark.

If calls are forced, the output is one call or several and nothing else. Otherwise it is text, in
which the opening of the tool-call format begins calls; from there the output is constrained as if
forced. Arguments match the function's schema; names and fixed strings appear exactly as
`ToolCallParser` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.grammar import lark_grammar
from service.api.fields import FieldNames
from service.api.structured.grammar import (
    check_grammar,
    invalid_grammar,
    json_rule,
    schema_error,
    within_limits,
)
from service.api.structured.json_schema import (
    Schema,
    Validate,
    relax,
    without_annotations,
    without_property_counts,
)
from service.api.structured.output import JsonOutput
from service.api.tools.chat import FunctionDefinition, ToolUse
from service.api.tools.formats import ToolFormat
from service.errors import BadRequest

MAX_CALLS = 32  # per answer: it stops a model that never stops calling

# The spacing that models are trained on, without optional blanks in which a small one may get lost.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


async def validated_tools_grammar(
    tools: ToolUse,
    tool_format: ToolFormat,
    marker_ids: Mapping[str, int],
    validate: Validate,
    *,
    output: JsonOutput | None,
    names: FieldNames,
) -> str:
    """A grammar in `model.grammar`'s notation for calls, or for text that matches `output`: forced
    calls leave no text. Raises BadRequest, RateLimited or Unavailable.
    """
    if tools.forced:
        output = None
    if output is not None and tool_format.only_first:
        message = f"this model cannot combine tools with {names.output}"
        raise BadRequest(message, param=names.output)
    text = None if output is None else (await json_rule(output, validate, names=names)).text
    functions = list(tools.functions)
    for index in tools.may_call:
        path = names.parameters.format(index)
        functions[index] = _within_limits(functions[index], path)
    tools = replace(tools, functions=tuple(functions))
    grammar = tools_grammar(tools, tool_format, marker_ids, text=text)
    if await validate(grammar) is None:
        return grammar
    for index in tools.may_call:
        path = names.parameters.format(index)
        functions[index] = await _expressible(functions[index], validate, path)
    tools = replace(tools, functions=tuple(functions))
    grammar = tools_grammar(tools, tool_format, marker_ids, text=text)
    await check_grammar(grammar, validate, param="tools")
    return grammar


def _within_limits(function: FunctionDefinition, path: str) -> FunctionDefinition:
    if function.parameters is None:
        return function
    parameters = within_limits(function.parameters, strict=function.strict, path=path)
    return replace(function, parameters=parameters)


async def _expressible(
    function: FunctionDefinition, validate: Validate, path: str
) -> FunctionDefinition:
    """The function with parameters that a grammar can express. Raises BadRequest if it is strict
    and has others, and if the parameters are not a schema or too complex.
    """

    def grammar_of(parameters: Schema) -> str:
        changed = replace(function, parameters=dict(parameters))
        return lark_grammar(f"start: {arguments_rule(changed)}")

    if function.parameters is None:
        return function
    error = await validate(grammar_of(function.parameters))
    if error is None:
        return function
    if function.strict:
        raise await schema_error(function.parameters, validate, error, param=path, path=path)
    parameters = await relax(function.parameters, validate, error=error, grammar_of=grammar_of)
    if parameters is None:
        raise invalid_grammar(path, error)
    return replace(function, parameters=parameters)


def tools_grammar(
    tools: ToolUse,
    tool_format: ToolFormat,
    marker_ids: Mapping[str, int],
    *,
    text: str | None = None,
) -> str:
    """A grammar in `model.grammar`'s notation.

    `marker_ids`: ids of the markers that are special tokens; `text`: the right side of a rule for
    output without calls, if that is not any text.
    """
    spell = _Speller(tool_format, marker_ids)
    heads = " | ".join(spell(head) for head in tool_format.heads if head)
    first = f"({heads}) call" if heads else "call"
    if text is None:
        rules = _start(tools, tool_format, spell)
    else:
        rules = [f"start: formatted | {spell(tool_format.opening)} calls", f"formatted: {text}"]
    rules += [
        f"calls: {first}{_more(tools, tool_format, spell)} {spell(tool_format.end)}".rstrip(),
        f"call: function {spell(tool_format.tail)}",
        "function: " + " | ".join(f"function_{index}" for index in tools.may_call),
    ]
    if tool_format.id_mark is not None:
        pattern = f"/[a-zA-Z0-9]{{{tool_format.id_length}}}/"
        rules += [f"id: {spell(tool_format.id_mark)} ID", f"ID: {pattern}"]
    for index in tools.may_call:
        function = tools.functions[index]
        rules += [
            f"function_{index}: {_named(function.name, tool_format, spell)} arguments_{index}",
            f"arguments_{index}: {arguments_rule(function)}",
        ]
    return lark_grammar("\n".join(rules))


def _named(name: str, tool_format: ToolFormat, spell: _Speller) -> str:
    """The part of a call from the function's name to its arguments."""
    if tool_format.id_mark is None:
        return spell(name + tool_format.between)
    return f"{spell(name)} id? {spell(tool_format.between)}"


def arguments_rule(function: FunctionDefinition) -> str:
    """The right side of a rule for a function's arguments."""
    schema: Schema = _NO_ARGUMENTS
    if function.parameters is not None:
        schema = without_annotations(function.parameters)
    options: dict[str, Any] = _SPACING
    if not function.strict:  # what a grammar cannot express is left to the model
        schema, options = without_property_counts(schema), _SPACING | {"lenient": True}
    constrained = {"type": "object", **schema, "x-guidance": options}
    return f"%json {json.dumps(constrained, separators=(',', ':'))}"


def _start(tools: ToolUse, tool_format: ToolFormat, spell: _Speller) -> list[str]:
    opening = spell(tool_format.opening)
    if tools.forced:
        return [f"start: {opening} calls"]
    if tool_format.only_first:
        pattern = re.escape(tool_format.opening).replace("/", r"\/").replace(r"\ ", " ")
        return [f"start: TEXT | {opening} calls", rf"TEXT: /(.|\n)*/ & ~/{pattern}(.|\n)*/"]
    text = r"TEXT: /(.|\n)*/"
    if opening.startswith("<["):
        return [f"start: TEXT | opened calls\nopened: TEXT {opening}", text]
    return [f"start: TEXT | opened calls\nopened[lazy]: TEXT {opening}", text]


def _more(tools: ToolUse, tool_format: ToolFormat, spell: _Speller) -> str:
    if tool_format.joint is None or not tools.parallel:
        return ""
    return f" ({spell(tool_format.joint)} call){{0,{MAX_CALLS - 1}}}"


class _Speller:
    """Writes a fixed string in Lark: quoted, and special tokens within it by their ids."""

    def __init__(self, tool_format: ToolFormat, marker_ids: Mapping[str, int]) -> None:
        self._ids = marker_ids
        markers = [marker for marker in tool_format.markers if marker in marker_ids]
        self._markers = re.compile(f"({'|'.join(map(re.escape, markers))})") if markers else None

    def __call__(self, fixed: str) -> str:
        parts = self._markers.split(fixed) if self._markers else [fixed]
        return " ".join(
            f"<[{self._ids[part]}]>" if part in self._ids else json.dumps(part)
            for part in parts
            if part
        )
