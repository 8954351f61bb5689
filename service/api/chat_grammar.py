"""The grammar of a chat's answer: what its format asks for, what its tools ask for, or both."""

from __future__ import annotations

from model.grammar import json_text, lark_grammar
from service.api.context import ApiContext
from service.api.grammars import asked_grammar, check_alone, check_grammar
from service.api.schemas import ChatBody
from service.api.tool_grammar import arguments_rule, tools_grammar
from service.api.tool_notation import NOTATIONS, notation_name
from service.api.tools import ToolUse
from service.errors import BadRequest


async def chat_grammar(body: ChatBody, context: ApiContext, *, tools: ToolUse | None) -> str | None:
    """In `model.grammar`'s notation, checked. Raises BadRequest or Unavailable."""
    if tools is None:
        return await asked_grammar(body, context)
    check_alone(body)
    notation = NOTATIONS[notation_name(context.tokenizer)]
    text = _format_rule(body)
    if body.structured_outputs is not None:
        raise BadRequest("structured_outputs and tools exclude each other", param="tools")
    if text is not None and (tools.forced or notation.only_first):
        message = f"{body.format_field} leaves no room for calls that must be made"
        if notation.only_first:
            message = f"this model cannot have tools beside {body.format_field}"
        raise BadRequest(message, param=body.format_field)
    if text is not None:
        await asked_grammar(body, context)  # its faults are its own
    marker_ids = notation.marker_ids(context.tokenizer)
    grammar = tools_grammar(tools, notation, marker_ids, text=text)
    if await context.grammars.fault(grammar) is not None:
        await _blame(body, context, tools=tools)
        await check_grammar(grammar, context, param="tools")
    return grammar


def _format_rule(body: ChatBody) -> str | None:
    """The right side of a Lark rule for text of the format that is asked for."""
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    schema = {"type": "object"} if asked.json_schema is None else asked.json_schema.schema_
    return f"%json {json_text(schema)}"


async def _blame(body: ChatBody, context: ApiContext, *, tools: ToolUse) -> None:
    """Raises BadRequest for the first function whose parameters alone are a fault."""
    for index in tools.may_call:
        grammar = lark_grammar(f"start: {arguments_rule(tools.functions[index])}")
        await check_grammar(grammar, context, param=body.parameters_field.format(index))
