"""Grammars of a call: from the fields of a body to a notation that is known to compile.

    asked_grammar   response_format or structured_outputs -> notation              [400]
    check_grammar   any notation, tried under limits (see `grammar_trials`)        [400, 503]

A grammar says where the answer ends, so fields that say otherwise are refused beside it. Stop
strings and stop tokens are not: they cut the answer, as the token limit does.
"""

from __future__ import annotations

import json
from typing import Any

from model.grammar import (
    choice_grammar,
    gbnf_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from service.api.context import ApiContext
from service.api.grammar_schema import ResponseFormat, StructuredOutputs
from service.api.schemas import GenerationBody
from service.errors import BadRequest


async def asked_grammar(body: GenerationBody, context: ApiContext) -> str | None:
    """The grammar that a body asks for, checked. Raises BadRequest or Unavailable."""
    if body.response_format is not None and body.structured_outputs is not None:
        raise BadRequest(
            "response_format and structured_outputs exclude each other", param="structured_outputs"
        )
    param, notation = body.format_field, None
    if body.response_format is not None:
        notation = _format_grammar(body.response_format, param)
    elif body.structured_outputs is not None:
        param, notation = _output_grammar(body.structured_outputs)
    if notation is not None:
        check_alone(body)
        await check_grammar(notation, context, param=param)
    return notation


def check_alone(body: GenerationBody) -> None:
    """Raises BadRequest for fields that contradict any grammar."""
    for name in ("min_tokens", "ignore_eos"):
        if getattr(body, name):
            raise BadRequest(
                f"{name} contradicts a grammar, which says where the answer ends", param=name
            )


async def check_grammar(notation: str, context: ApiContext, *, param: str) -> None:
    """Raises BadRequest, with `param`, for what does not compile within the limits."""
    fault = await context.grammars.fault(notation)
    if fault is not None:
        raise BadRequest(f"{param} {fault}", code="invalid_grammar", param=param)


def _format_grammar(asked: ResponseFormat, param: str) -> str | None:
    if asked.type != "json_schema":
        if asked.json_schema is not None:
            raise BadRequest(f"a schema in {param} needs the type json_schema", param=param)
        return json_object_grammar() if asked.type == "json_object" else None
    if asked.json_schema is None:
        raise BadRequest(f"{param} needs a schema", code="missing_required_parameter", param=param)
    return json_schema_grammar(asked.json_schema.schema_)


def _output_grammar(asked: StructuredOutputs) -> tuple[str, str]:
    """(param, notation) of the one field that is given."""
    notations = {
        "json": None if asked.json_ is None else json_schema_grammar(_schema(asked.json_)),
        "json_object": json_object_grammar() if asked.json_object else None,
        "regex": None if asked.regex is None else regex_grammar(_unanchored(asked.regex)),
        "choice": None if asked.choice is None else choice_grammar(asked.choice),
        "grammar": None if asked.grammar is None else _free_grammar(asked.grammar),
    }
    given = {name: notation for name, notation in notations.items() if notation is not None}
    if len(given) != 1:
        raise BadRequest(
            f"structured_outputs needs exactly one of {', '.join(notations)}",
            param="structured_outputs",
        )
    ((name, notation),) = given.items()
    return f"structured_outputs.{name}", notation


def _schema(value: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = ""
    if not isinstance(value, dict):
        raise BadRequest(
            "structured_outputs.json must be a JSON schema",
            code="invalid_grammar",
            param="structured_outputs.json",
        )
    return value


def _unanchored(pattern: str) -> str:
    """The pattern itself. Raises BadRequest for anchors: there is nothing to search in."""
    depth = 0  # of character classes, where they are ordinary characters
    escaped = False
    for char in pattern:
        if escaped or char == "\\":
            escaped = not escaped
        elif char in "[]":
            depth = max(0, depth + (1 if char == "[" else -1))
        elif char in "^$" and not depth:
            raise BadRequest(
                "structured_outputs.regex always matches the whole answer: leave ^ and $ out",
                code="invalid_grammar",
                param="structured_outputs.regex",
            )
    return pattern


def _free_grammar(text: str) -> str:
    return gbnf_grammar(text) if "::=" in text else lark_grammar(text)
