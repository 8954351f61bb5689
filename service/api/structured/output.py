"""What the output of a request must match, in no dialect's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from service.api.fields import FieldNames
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
