"""Grammars of a call: from the fields of a body to a notation that is known to compile.

    asked_grammar   response_format or structured_outputs -> notation      [400, 429, 503]
    format_rule     response_format -> a rule for JSON                     [400, 429, 503]
    check_grammar   any notation, tried under limits (see `grammar_trials`)

A schema that is not `strict` binds as far as a grammar can express it; a strict one that cannot be
expressed is refused, by the name of the property.

A grammar determines the end of an answer, so fields that contradict it are refused. Stop
strings and stop tokens are not: they cut the answer, as the token limit does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from model.grammar import (
    choice_grammar,
    gbnf_grammar,
    json_object_grammar,
    json_schema_grammar,
    json_text,
    lark_grammar,
    regex_grammar,
)
from service.api.context import ApiContext
from service.api.openai.schema import GenerationBody
from service.api.structured.json_schema import (
    Schema,
    Validate,
    first_unsupported,
    first_excess,
    relax,
    without_excess_properties,
    without_property_counts,
)
from service.api.structured.schema import StructuredOutputs
from service.api.structured.validator import OVER_LIMITS
from service.errors import BadRequest


async def asked_grammar(body: GenerationBody, context: ApiContext, *, tenant: str) -> str | None:
    """The grammar that a body asks for, checked. Raises BadRequest, RateLimited or Unavailable."""
    if body.response_format is not None and body.structured_outputs is not None:
        raise BadRequest(
            "response_format and structured_outputs exclude each other", param="structured_outputs"
        )
    trial = partial(context.grammars.error, tenant=tenant)
    if body.structured_outputs is not None:
        check_alone(body)
        return await _checked_output(body.structured_outputs, trial)
    rule = await format_rule(body, trial)
    return None if rule is None else rule.notation


@dataclass(frozen=True, slots=True)
class JsonRule:
    """JSON of a schema; `lenient` ignores what a grammar cannot express."""

    schema: Schema
    lenient: bool = False

    @property
    def text(self) -> str:
        """The right side of a rule in Lark."""
        schema = without_property_counts(self.schema) if self.lenient else self.schema
        return f"%json {json_text(schema, lenient=self.lenient)}"

    @property
    def notation(self) -> str:
        """The grammar of an answer that is nothing else."""
        if self.lenient:
            return lark_grammar(f"start: {self.text}")
        return json_schema_grammar(self.schema)


async def format_rule(body: GenerationBody, trial: Validate) -> JsonRule | None:
    """What the field of the format asks for, checked; None: any text.

    Raises BadRequest, RateLimited or Unavailable.
    """
    asked, param = body.response_format, body.format_field
    if asked is None:
        return None
    if asked.json_schema is not None and asked.type != "json_schema":
        raise BadRequest(f"a schema in {param} needs the type json_schema", param=param)
    if asked.type == "text":
        return None
    check_alone(body)
    if asked.type == "json_object":
        return JsonRule({"type": "object"})
    if asked.json_schema is None:
        raise BadRequest(f"{param} needs a schema", code="missing_required_parameter", param=param)
    schema = bounded(
        asked.json_schema.schema_, strict=asked.json_schema.strict, path=body.schema_field
    )
    rule = JsonRule(schema)
    verdict = await trial(rule.notation)
    if verdict is None:
        return rule
    if asked.json_schema.strict:
        raise await schema_error(rule.schema, trial, verdict, param=param, path=body.schema_field)
    fitted = await relax(rule.schema, trial, error=verdict, grammar_of=_lenient)
    if fitted is None:
        raise invalid_grammar(param, verdict)
    return JsonRule(fitted, lenient=True)


def _lenient(schema: Schema) -> str:
    return JsonRule(schema, lenient=True).notation


def check_alone(body: GenerationBody) -> None:
    """Raises BadRequest for fields that contradict any grammar."""
    for name in ("min_tokens", "ignore_eos"):
        if getattr(body, name):
            raise BadRequest(
                f"{name} contradicts a grammar, which determines the end of the answer", param=name
            )


async def check_grammar(notation: str, trial: Validate, *, param: str) -> None:
    """Raises BadRequest, with `param`, for what does not compile within the limits."""
    verdict = await trial(notation)
    if verdict is not None:
        raise invalid_grammar(param, verdict)


def bounded(schema: Schema, *, strict: bool | None, path: str) -> Schema:
    """The schema at `path` within the limits of a grammar. Raises BadRequest if it is strict and
    beyond them.
    """
    if strict and (found := first_excess(schema)) is not None:
        raise _property_error(path, *found)
    return without_excess_properties(schema)


async def schema_error(
    schema: Schema, trial: Validate, verdict: str, *, param: str, path: str
) -> BadRequest:
    """The error for a schema at `path` that must be followed strictly and cannot be. It names the
    property, if one is found.
    """
    found = None if verdict in OVER_LIMITS else await first_unsupported(schema, trial)
    if found is None:
        return invalid_grammar(param, verdict)
    return _property_error(path, *found)


def _property_error(path: str, inner: str, reason: str) -> BadRequest:
    message = f"{path}.{inner}: {reason} in a strict schema"
    return BadRequest(message, code="invalid_grammar", param=f"{path}.{inner}")


def invalid_grammar(param: str, verdict: str) -> BadRequest:
    """The error for a field whose grammar has this verdict."""
    return BadRequest(f"{param} {verdict}", code="invalid_grammar", param=param)


async def _checked_output(asked: StructuredOutputs, trial: Validate) -> str:
    param, notation = _output_grammar(asked)
    if asked.json_ is not None:
        bounded(_schema(asked.json_), strict=True, path=param)
    verdict = await trial(notation)
    if verdict is not None and asked.json_ is not None:
        raise await schema_error(_schema(asked.json_), trial, verdict, param=param, path=param)
    if verdict is not None:
        raise invalid_grammar(param, verdict)
    return notation


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
    depth = 0  # of character classes; in them anchors are ordinary characters
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
