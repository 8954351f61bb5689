"""Structured output: OpenAI's `response_format` and vLLM's `structured_outputs`, and from them to a
grammar that is known to compile.

    output_grammar   JsonOutput or Constraint -> grammar                   [400, 429, 503]
    json_rule        JsonOutput -> a rule for JSON, to combine with tools  [400, 429, 503]

A schema that is not `strict` constrains the output as far as a grammar can express it; for a strict
one that cannot be expressed the error names the property.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from model.grammar import (
    choice_grammar,
    gbnf_grammar,
    json_object_grammar,
    json_schema_grammar,
    json_text,
    lark_grammar,
    regex_grammar,
)
from service.api.http.errors import FieldNames
from service.api.http.fields import FieldError, Label, Text
from service.api.http.models import StrictModel
from service.api.structured.json_schema import (
    Schema,
    Validate,
    first_excess,
    first_unsupported,
    relax,
    without_excess_properties,
    without_property_counts,
)
from service.api.structured.validator import OVER_LIMITS
from service.errors import BadRequest

Json = dict[str, Any]
Kind = Literal["json", "json_object", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonOutput:
    """A JSON object, of a schema if one is given. It can be combined with tools."""

    schema: Json | None = None
    strict: bool = False  # a schema that a grammar cannot express exactly is an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """vLLM's `structured_outputs`: one of its fields, by name. It excludes tools."""

    kind: Kind
    value: Json | str | tuple[str, ...]  # of json_object: empty


OutputFormat = JsonOutput | Constraint


def json_output(
    kind: Literal["text", "json_object", "json_schema"],
    *,
    schema: Json | None,
    strict: bool | None,
    names: FieldNames,
) -> JsonOutput | None:
    """Returns None for any text. Raises BadRequest unless exactly json_schema has a schema."""
    param = names.output
    if schema is not None and kind != "json_schema":
        raise BadRequest(f"a schema in {param} needs the type json_schema", param=param)
    if schema is None and kind == "json_schema":
        raise BadRequest(f"{param} needs a schema", code="missing_required_parameter", param=param)
    return None if kind == "text" else JsonOutput(schema=schema, strict=bool(strict))


MAX_CHOICES = 1024


def _texts(value: object) -> object:
    """Runs before the items are validated, so that a rejection stays cheap."""
    if isinstance(value, list) and len(value) > MAX_CHOICES:
        raise FieldError("array_above_max_length", f"may have at most {MAX_CHOICES} items")
    return value


class JsonSchema(StrictModel):
    """A JSON schema with a name."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Label | None = Field(None, description="The name of the schema; has no effect.")
    description: Text | None = Field(
        None, description="A description of the schema; has no effect."
    )
    schema_: dict[str, Any] = Field(alias="schema", description="The schema of the answer.")
    strict: bool | None = Field(
        None,
        description="Reject a schema that cannot be enforced exactly. Default false: parts that "
        "cannot be enforced are left to the model.",
    )


class ResponseFormat(StrictModel):
    """OpenAI's format of the answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Any text, a JSON object, or JSON of a schema."
    )
    json_schema: JsonSchema | None = Field(None, description="Only with the type json_schema.")

    def output(self, names: FieldNames) -> JsonOutput | None:
        """Returns None for any text. Raises BadRequest."""
        schema = self.json_schema
        return json_output(
            self.type,
            schema=None if schema is None else schema.schema_,
            strict=None if schema is None else schema.strict,
            names=names,
        )


class StructuredOutputs(StrictModel):
    """vLLM's constraints on the answer: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(
        None, alias="json", description="A JSON schema that the answer must match."
    )
    json_object: bool | None = Field(None, description="The answer must be a JSON object.")
    regex: Text | None = Field(
        None,
        min_length=1,
        description="A regular expression that must match the whole answer: without anchors, "
        "look-around and back references.",
    )
    choice: Annotated[list[Text] | None, BeforeValidator(_texts)] = Field(
        None, min_length=1, description="The answer must be one of these texts."
    )
    grammar: Text | None = Field(
        None,
        min_length=1,
        description="A grammar of the answer, in Lark or in llama.cpp's GBNF.",
    )

    def constraint(self) -> Constraint:
        """Raises BadRequest unless exactly one field is given."""
        fields: dict[Kind, dict[str, Any] | str | tuple[str, ...] | None] = {
            "json": self.json_,
            "json_object": {} if self.json_object else None,
            "regex": self.regex,
            "choice": None if self.choice is None else tuple(self.choice),
            "grammar": self.grammar,
        }
        given = [(kind, value) for kind, value in fields.items() if value is not None]
        if len(given) != 1:
            raise BadRequest(
                f"structured_outputs needs exactly one of {', '.join(fields)}",
                param="structured_outputs",
            )
        ((kind, value),) = given
        return Constraint(kind=kind, value=value)


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
    def grammar(self) -> str:
        """The grammar of an output that is this JSON and nothing else."""
        return (
            lark_grammar(f"start: {self.text}")
            if self.lenient
            else json_schema_grammar(self.schema)
        )


async def output_grammar(output: OutputFormat, validate: Validate, *, names: FieldNames) -> str:
    """A grammar in `model.grammar`'s notation, validated. Raises BadRequest, RateLimited or
    Unavailable.
    """
    if isinstance(output, JsonOutput):
        return (await json_rule(output, validate, names=names)).grammar
    param = f"structured_outputs.{output.kind}"
    if output.kind != "json":
        grammar = _constraint_grammar(output)
        await check_grammar(grammar, validate, param=param)
        return grammar
    schema = _parsed(output.value)
    within_limits(schema, strict=True, path=param)
    grammar = json_schema_grammar(schema)
    error = await validate(grammar)
    if error is not None:
        raise await schema_error(schema, validate, error, param=param, path=param)
    return grammar


async def json_rule(output: JsonOutput, validate: Validate, *, names: FieldNames) -> JsonRule:
    """A validated rule. Raises BadRequest, RateLimited or Unavailable."""
    if output.schema is None:
        return JsonRule({"type": "object"})
    rule = JsonRule(within_limits(output.schema, strict=output.strict, path=names.schema))
    error = await validate(rule.grammar)
    if error is None:
        return rule
    param = names.output
    if output.strict:
        raise await schema_error(rule.schema, validate, error, param=param, path=names.schema)
    schema = await relax(rule.schema, validate, error=error, grammar_of=_lenient_grammar)
    if schema is None:
        raise invalid_grammar(param, error)
    return JsonRule(schema, lenient=True)


def _lenient_grammar(schema: Schema) -> str:
    return JsonRule(schema, lenient=True).grammar


async def check_grammar(grammar: str, validate: Validate, *, param: str) -> None:
    """Raises BadRequest, with `param`, if the grammar does not compile within the limits."""
    error = await validate(grammar)
    if error is not None:
        raise invalid_grammar(param, error)


def within_limits(schema: Schema, *, strict: bool, path: str) -> dict[str, Any]:
    """The schema at `path` within the limits of a grammar. Raises BadRequest if it is strict and
    exceeds them.
    """
    if strict and (found := first_excess(schema)) is not None:
        raise property_error(path, *found)
    return without_excess_properties(schema)


async def schema_error(
    schema: Schema, validate: Validate, error: str, *, param: str, path: str
) -> BadRequest:
    """The exception for a strict schema at `path` with this error. It names the property if one is
    found.
    """
    found = None if error in OVER_LIMITS else await first_unsupported(schema, validate)
    return invalid_grammar(param, error) if found is None else property_error(path, *found)


def invalid_grammar(param: str, error: str) -> BadRequest:
    """The exception for a field whose grammar has this error."""
    return BadRequest(f"{param} {error}", code="invalid_grammar", param=param)


def property_error(path: str, inner: str, reason: str) -> BadRequest:
    """The exception for a part of a strict schema at `path` that cannot be enforced."""
    message = f"{path}.{inner}: {reason} in a strict schema"
    return BadRequest(message, code="invalid_grammar", param=f"{path}.{inner}")


def _constraint_grammar(constraint: Constraint) -> str:
    """Of all kinds but JSON of a schema."""
    match constraint.kind, constraint.value:
        case "regex", str(pattern):
            return regex_grammar(without_anchors(pattern, param="structured_outputs.regex"))
        case "grammar", str(text):
            return gbnf_grammar(text) if "::=" in text else lark_grammar(text)
        case "choice", tuple(texts):
            return choice_grammar(texts)
        case _:
            return json_object_grammar()


def _parsed(value: object) -> dict[str, Any]:
    """The schema, also if it is given as text. Raises BadRequest."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        param = "structured_outputs.json"
        raise BadRequest(f"{param} must be a JSON schema", code="invalid_grammar", param=param)
    return value


def without_anchors(pattern: str, *, param: str) -> str:
    """Returns the pattern. Raises BadRequest for anchors: a pattern always matches all output."""
    depth = 0  # of character classes, in which anchors are ordinary characters
    escaped = False
    for char in pattern:
        if escaped or char == "\\":
            escaped = not escaped
        elif char in "[]":
            depth = max(0, depth + (1 if char == "[" else -1))
        elif char in "^$" and not depth:
            raise BadRequest(
                f"{param} must match the whole output: remove ^ and $",
                code="invalid_grammar",
                param=param,
            )
    return pattern
