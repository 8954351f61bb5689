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

from model.grammar import GrammarError, lark_grammar, lark_regex
from service.api.http.errors import FieldNames
from service.api.structured.grammar import (
    JsonOutput,
    check_grammar,
    invalid_grammar,
    json_rule,
    property_error,
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
from service.api.tools.arguments import BEFORE_INPUT, INPUT, PARAMETER, PARAMETER_END, VALUE
from service.api.tools.chat import FunctionDefinition, InputFormat, ToolUse
from service.api.tools.custom import (
    UnsupportedGrammarError,
    embedded_lark,
    escaped_regex,
)
from service.api.tools.formats import ToolFormat
from service.api.tools.tagged import SPACING, first_inexpressible, tagged_rules, text_rules
from service.errors import BadRequest

MAX_CALLS = 32  # per answer: it stops a model that never stops calling

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
        functions[index] = _within_limits(functions[index], tool_format, index, names)
    tools = replace(tools, functions=tuple(functions))
    grammar = tools_grammar(tools, tool_format, marker_ids, text=text)
    if await validate(grammar) is None:
        return grammar
    for index in tools.may_call:
        functions[index] = await _expressible(
            functions[index], tool_format, validate, index=index, names=names
        )
    tools = replace(tools, functions=tuple(functions))
    grammar = tools_grammar(tools, tool_format, marker_ids, text=text)
    await check_grammar(grammar, validate, param="tools")
    return grammar


def _within_limits(
    function: FunctionDefinition, tool_format: ToolFormat, index: int, names: FieldNames
) -> FunctionDefinition:
    """Raises BadRequest for a strict schema or an input format that is not supported."""
    path = names.parameters.format(index)
    if function.custom:
        _check_input_format(function, tool_format, _format_path(names, index))
    if function.custom or function.parameters is None:
        return function
    parameters = within_limits(function.parameters, strict=function.strict, path=path)
    if tool_format.tags and function.strict:
        found = first_inexpressible(parameters)
        if found is not None:
            raise property_error(path, *found)
    return replace(function, parameters=parameters)


def _format_path(names: FieldNames, index: int) -> str:
    """The field of a custom tool's format; in chats, tools have an object named like their type."""
    return names.function.format(index).replace(".function", ".custom") + ".format"


def _check_input_format(function: FunctionDefinition, tool_format: ToolFormat, param: str) -> None:
    try:
        _arguments_rules(0, function, tool_format)
    except (UnsupportedGrammarError, GrammarError) as error:
        message = f"{param} {error}"
        raise BadRequest(message, code="invalid_grammar", param=param) from None


async def _expressible(
    function: FunctionDefinition,
    tool_format: ToolFormat,
    validate: Validate,
    *,
    index: int,
    names: FieldNames,
) -> FunctionDefinition:
    """The function with parameters that a grammar can express. Raises BadRequest if it is strict
    and has others, and if the parameters or the input format are invalid or too complex.
    """

    def grammar_of(parameters: Schema) -> str:
        changed = replace(function, parameters=dict(parameters))
        rules = _arguments_rules(0, changed, tool_format)
        return lark_grammar("\n".join(["start: arguments_0", *rules]))

    path = names.parameters.format(index)
    if function.custom:
        param = _format_path(names, index)
        await check_grammar(grammar_of({}), validate, param=param)
    if function.custom or function.parameters is None:
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
    rules = [
        *_start(tools, tool_format, spell, text=text),
        f"calls: {first}{_more(tools, tool_format, spell)} {spell(tool_format.end)}".rstrip(),
        f"call: function {spell(tool_format.tail)}",
        "function: " + " | ".join(f"function_{index}" for index in tools.may_call),
    ]
    if tool_format.id_mark is not None:
        pattern = f"/[a-zA-Z0-9]{{{tool_format.id_length}}}/"
        rules += [f"id: {spell(tool_format.id_mark)} ID", f"ID: {pattern}"]
    for index in tools.may_call:
        function = tools.functions[index]
        named = _named(function.name, tool_format, spell)
        rules.append(f"function_{index}: {named} arguments_{index}")
        rules += _arguments_rules(index, function, tool_format)
    return lark_grammar("\n".join(rules))


def _named(name: str, tool_format: ToolFormat, spell: _Speller) -> str:
    """The part of a call from the function's name to its arguments."""
    if tool_format.id_mark is None:
        return spell(name + tool_format.between)
    return f"{spell(name)} id? {spell(tool_format.between)}"


def _arguments_rules(
    index: int, function: FunctionDefinition, tool_format: ToolFormat
) -> list[str]:
    """Rules of which `arguments_{index}` derives the arguments. Raises UnsupportedGrammarError or
    GrammarError.
    """
    if function.custom and function.input_format is not None:
        return _input_rules(index, function.input_format, tags=tool_format.tags)
    if tool_format.tags:
        return tagged_rules(index, function)
    schema: Schema = _NO_ARGUMENTS
    if function.custom:
        schema = function.schema | {"additionalProperties": False}
    elif function.parameters is not None:
        schema = without_annotations(function.parameters)
    options: dict[str, Any] = dict(SPACING)
    if not function.strict:  # what a grammar cannot express is left to the model
        schema, options["lenient"] = without_property_counts(schema), True
    constrained = {"type": "object", **schema, "x-guidance": options}
    return [f"arguments_{index}: %json {json.dumps(constrained, separators=(',', ':'))}"]


def _input_rules(index: int, form: InputFormat, *, tags: bool) -> list[str]:
    """The same of a custom tool whose input has a format."""
    before, after = (f"{PARAMETER}{INPUT}{VALUE}", PARAMETER_END) if tags else (BEFORE_INPUT, '"}')
    name = f"input_{index}"
    begin = f"arguments_{index}: {json.dumps(before)} {name}"
    if form.syntax == "lark":
        text = embedded_lark(form.definition, escaped=not tags)
        return [f"{begin} {json.dumps(after)}", f"{name}: %lark {{", text, "}"]
    pattern = form.definition.removeprefix("^")
    if re.search(r"(?<!\\)(\\\\)*\$$", pattern):
        pattern = pattern[:-1]
    if tags:
        return [begin, *text_rules(name, lark_regex(pattern)[1:-1])]
    terminal = f"{name.upper()}: {lark_regex(escaped_regex(pattern))}"
    return [f"{begin} {json.dumps(after)}", f"{name}: {name.upper()}", terminal]


def _start(
    tools: ToolUse, tool_format: ToolFormat, spell: _Speller, *, text: str | None
) -> list[str]:
    """The rules of the output. `text`: the right side of the rule of its text, if not any text."""
    opening = spell(tool_format.opening)
    if tool_format.prefix in spell.ids:
        opening = f"{spell(tool_format.prefix)}? {opening}"
    if tools.forced:
        return [f"start: {opening} calls"]
    if tool_format.only_first:
        pattern = re.escape(tool_format.opening).replace("/", r"\/").replace(r"\ ", " ")
        return [f"start: TEXT | {opening} calls", rf"TEXT: /(.|\n)*/ & ~/{pattern}(.|\n)*/"]
    if text is not None:
        return [*_framed(tool_format, spell, f"formatted | {opening} calls"), f"formatted: {text}"]
    lazy = "" if opening.startswith("<[") else "[lazy]"
    framed = _framed(tool_format, spell, "TEXT | opened calls")
    return [*framed, f"opened{lazy}: TEXT {opening}", r"TEXT: /(.|\n)*/"]


def _framed(tool_format: ToolFormat, spell: _Speller, output: str) -> list[str]:
    """Rules for an output whose texts may have frames; several, if each but the last is closed."""
    if not tool_format.frames or tool_format.frames[0] in spell(tool_format.frames[0]):
        return [f"start: {output}"]
    frames = " | ".join(map(spell, tool_format.frames))
    return [
        f"start: (frame? BEFORE {spell(tool_format.closing)})* frame? ({output})",
        f"frame: {frames}",
        r"BEFORE: /(.|\n)*/",
    ]


def _more(tools: ToolUse, tool_format: ToolFormat, spell: _Speller) -> str:
    if tool_format.joint is None or not tools.parallel:
        return ""
    return f" ({spell(tool_format.joint)} call){{0,{MAX_CALLS - 1}}}"


class _Speller:
    """Writes a fixed string in Lark: quoted, and special tokens within it by their ids."""

    def __init__(self, tool_format: ToolFormat, marker_ids: Mapping[str, int]) -> None:
        self.ids = marker_ids
        markers = [marker for marker in tool_format.markers if marker in marker_ids]
        self._markers = re.compile(f"({'|'.join(map(re.escape, markers))})") if markers else None

    def __call__(self, fixed: str) -> str:
        parts = self._markers.split(fixed) if self._markers else [fixed]
        return " ".join(
            f"<[{self.ids[part]}]>" if part in self.ids else json.dumps(part)
            for part in parts
            if part
        )
