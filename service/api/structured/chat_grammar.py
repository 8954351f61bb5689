"""The grammar of a chat's answer: what its format asks for, what its tools ask for, or both."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from model.grammar import lark_grammar
from service.api.context import ApiContext
from service.api.openai.schema import ChatBody
from service.api.structured.grammars import (
    asked_grammar,
    bounded,
    check_alone,
    check_grammar,
    format_rule,
    invalid_grammar,
    schema_error,
)
from service.api.structured.json_schema import Schema, Validate, relax
from service.api.tools.formats import TOOL_FORMATS, tool_format_name
from service.api.tools.grammar import arguments_rule, tools_grammar
from service.api.tools.plan import ToolUse
from service.api.tools.schema import Function
from service.errors import BadRequest


async def chat_grammar(
    body: ChatBody, context: ApiContext, *, tenant: str, tools: ToolUse | None
) -> str | None:
    """In `model.grammar`'s notation, checked. Raises BadRequest, RateLimited or Unavailable."""
    if tools is None:
        return await asked_grammar(body, context, tenant=tenant)
    check_alone(body)
    notation = TOOL_FORMATS[tool_format_name(context.tokenizer)]
    if body.structured_outputs is not None:
        raise BadRequest("structured_outputs and tools exclude each other", param="tools")
    formatted = body.response_format is not None and body.response_format.type != "text"
    if formatted and (tools.forced or notation.only_first):
        message = f"{body.format_field} leaves no room for calls that must be made"
        if notation.only_first:
            message = f"this model cannot combine tools with {body.format_field}"
        raise BadRequest(message, param=body.format_field)
    trial = partial(context.grammars.error, tenant=tenant)
    rule = await format_rule(body, trial)
    text = None if rule is None else rule.text
    marker_ids = notation.marker_ids(context.tokenizer)
    tools = _bounded_tools(body, tools)
    grammar = tools_grammar(tools, notation, marker_ids, text=text)
    if await trial(grammar) is not None:
        fitted = await _fitting_tools(body, tools, trial)
        grammar = tools_grammar(fitted, notation, marker_ids, text=text)
        await check_grammar(grammar, trial, param="tools")
    return grammar


def _bounded_tools(body: ChatBody, tools: ToolUse) -> ToolUse:
    """Tools with parameters within the limits of a grammar. Raises BadRequest for a strict one
    with others.
    """
    functions = list(tools.functions)
    for index in tools.may_call:
        function, path = functions[index], body.parameters_field.format(index)
        if function.parameters is not None:
            parameters = bounded(function.parameters, strict=function.strict, path=path)
            functions[index] = function.model_copy(update={"parameters": parameters})
    return replace(tools, functions=tuple(functions))


async def _fitting_tools(body: ChatBody, tools: ToolUse, trial: Validate) -> ToolUse:
    """Tools with parameters that a grammar can express. Raises BadRequest for the first function
    that is strict and has others, and for one whose parameters are no schema or too complex.
    """
    functions = list(tools.functions)
    for index in tools.may_call:
        param = body.parameters_field.format(index)
        functions[index] = await _fitting_function(functions[index], trial, param=param)
    return replace(tools, functions=tuple(functions))


async def _fitting_function(function: Function, trial: Validate, *, param: str) -> Function:
    def grammar_of(parameters: Schema) -> str:
        fitted = function.model_copy(update={"parameters": parameters})
        return lark_grammar(f"start: {arguments_rule(fitted)}")

    verdict = None
    if function.parameters is not None:
        verdict = await trial(grammar_of(function.parameters))
    if verdict is None or function.parameters is None:
        return function
    if function.strict:
        raise await schema_error(function.parameters, trial, verdict, param=param, path=param)
    parameters = await relax(function.parameters, trial, error=verdict, grammar_of=grammar_of)
    if parameters is None:
        raise invalid_grammar(param, verdict)
    return function.model_copy(update={"parameters": parameters})
