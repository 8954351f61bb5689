"""What the output of a request must match, in no dialect's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonOutput:
    """A JSON object, of a schema if one is given. It can be combined with tools."""

    schema: Json | None = None
    strict: bool = False  # a schema that a grammar cannot express exactly is an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """vLLM's `structured_outputs`: one of its fields, by name. It excludes tools."""

    kind: Literal["json", "json_object", "regex", "choice", "grammar"]
    value: Json | str | tuple[str, ...] | None  # None: of kind json_object


OutputFormat = JsonOutput | Constraint
