"""JSON schemas as grammars: the keywords that a grammar can express.

    without_annotations         titles, descriptions, defaults and examples removed
    without_excess_properties   optional properties removed if they exceed the limits of a grammar
    without_property_counts     limits removed that a lenient grammar gets wrong
    relax                       patterns relaxed until a grammar can express them
    first_excess                the first object with too many optional properties
    first_unsupported           the first property that a grammar cannot express

A schema that is not strict is relaxed: a pattern loses its look-around or, if that does not help,
is removed; a lenient grammar ignores other unsupported keywords and formats. Relaxing only allows
more. For a strict schema the error names the property. Whether a part can be expressed is decided
by validating that part alone.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any

from model.grammar import json_schema_grammar
from service.api.structured.validator import OVER_LIMITS, UNSUPPORTED_KEYWORDS

MAX_PARTS = 64  # of one schema that are validated alone
MAX_PATH_CHARS = 100
MAX_OPTIONAL = 150  # properties of one object

# A grammar -> its error, as the end of a sentence; None: it is valid.
Validate = Callable[[str], Awaitable[str | None]]
Schema = Mapping[str, Any]
# A pattern -> its replacement; None: it is removed.
Replacements = Mapping[str, str | None]

# Annotations; keywords that hold schemas by name; keywords that hold no schema.
_ANNOTATIONS = frozenset({"$comment", "default", "deprecated", "description", "examples", "title"})
_BY_NAME = frozenset(
    {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
)
_VALUES = frozenset({"const", "enum", "required"})
_KEYWORDS = UNSUPPORTED_KEYWORDS - {"format", "patternProperties"}
_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_PLAIN_NAME = re.compile(r"[\w$-]{1,64}(\[\d+\])*")


def without_annotations(schema: Schema) -> dict[str, Any]:
    """The prompt has the annotations; a grammar does not use them."""
    return _rebuilt(schema, lambda node: {k: v for k, v in node.items() if k not in _ANNOTATIONS})


def without_property_counts(schema: Schema) -> dict[str, Any]:
    """Removes limits on the number of properties from objects with optional properties: a lenient
    grammar counts additional properties only, and would forbid what the schema allows.
    """
    return _rebuilt(schema, _without_counts)


def _without_counts(node: dict[str, Any]) -> dict[str, Any]:
    if not _num_optional(node):
        return node
    return {k: v for k, v in node.items() if k not in {"minProperties", "maxProperties"}}


def without_excess_properties(schema: Schema) -> dict[str, Any]:
    """Removes the optional properties of objects that have more than MAX_OPTIONAL of them."""
    return _rebuilt(schema, _without_excess)


def first_excess(schema: Schema) -> tuple[str, str] | None:
    """Returns (dotted path, reason) of the first object with more than MAX_OPTIONAL of them."""
    for path, node in _nodes(schema, ()):
        if _num_optional(node) > MAX_OPTIONAL:
            reason = f"an object may have at most {MAX_OPTIONAL} optional properties"
            return _dotted((*path, "properties")), reason
    return None


async def relax(
    schema: Schema, validate: Validate, *, error: str, grammar_of: Callable[[Schema], str]
) -> dict[str, Any] | None:
    """Relaxes patterns until `grammar_of` the schema is valid; returns None if that fails.
    `error` is that of the original schema.
    """
    if error in OVER_LIMITS:
        return None
    replacements = await _replacements(schema, validate)
    for table in (replacements, dict.fromkeys(replacements)):
        relaxed = _rebuilt(schema, partial(_replaced, table=table))
        if await validate(grammar_of(relaxed)) is None:
            return relaxed
    return None


async def first_unsupported(schema: Schema, validate: Validate) -> tuple[str, str] | None:
    """Returns (dotted path, reason) of the first part that a grammar cannot express, if one is
    found. Inner parts come before those that contain them. Unusual names are written `*`.
    """
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    left = MAX_PARTS
    for path, node in _nodes(without_annotations(schema), ()):
        for keyword, part in _parts(node):
            if not left:
                return None
            left -= 1
            error = await validate(json_schema_grammar({**definitions, **part}))
            if error is not None and (reason := _reason(keyword, node, error)):
                return _dotted((*path, keyword)), reason
    return None


def without_assertions(pattern: str) -> str:
    """Removes look-around and word boundaries: the result matches at least as much."""
    kept: list[str] = []
    groups: list[bool] = []  # open groups; True: a look-around, which is removed
    in_class = False
    place = 0
    while place < len(pattern):
        piece = pattern[place : place + 2] if pattern[place] == "\\" else pattern[place]
        place += len(piece)
        leave_out = any(groups)
        if in_class:
            in_class = piece != "]"
        elif piece == "[":
            in_class = True
        elif piece == "(":
            groups.append(pattern.startswith(_LOOK_AROUND, place - 1))
            leave_out |= groups[-1]
        elif piece == ")" and groups:
            groups.pop()
        elif piece in {r"\b", r"\B"}:
            leave_out = True
        if not leave_out:
            kept.append(piece)
    return "".join(kept)


async def _replacements(schema: Schema, validate: Validate) -> dict[str, str | None]:
    """Replacements for the patterns that a grammar cannot express."""
    patterns = {
        pattern: None
        for _, node in _nodes(without_annotations(schema), ())
        for pattern in _patterns(node)
    }
    replacements: dict[str, str | None] = {}
    for index, pattern in enumerate(patterns):
        if index >= MAX_PARTS:
            replacements[pattern] = None
        elif await validate(_pattern_grammar(pattern)) is not None:
            relaxed = without_assertions(pattern)
            usable = relaxed != pattern and await validate(_pattern_grammar(relaxed)) is None
            replacements[pattern] = relaxed if usable else None
    return replacements


def _replaced(node: dict[str, Any], table: Replacements) -> dict[str, Any]:
    """Replaces the patterns of one schema, not of those within it. If a property pattern is
    removed, all property names are allowed: nothing else allows those that matched it.
    """
    result = dict(node)
    pattern, named = node.get("pattern"), node.get("patternProperties")
    if isinstance(pattern, str) and pattern in table:
        replacement = table[pattern]
        del result["pattern"]
        result |= {} if replacement is None else {"pattern": replacement}
    if isinstance(named, dict) and not table.keys().isdisjoint(named):
        result["patternProperties"] = {n: named[n] for n in named if n not in table}
        result.pop("additionalProperties", None)
        result.pop("unevaluatedProperties", None)
    return result


def _without_excess(node: dict[str, Any]) -> dict[str, Any]:
    """Changes one schema, not those within it. Removed properties stay allowed, with any value."""
    if _num_optional(node) <= MAX_OPTIONAL:
        return node
    left_out = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
    required = node.get("required", [])
    kept = {name: value for name, value in node["properties"].items() if name in required}
    return {k: v for k, v in node.items() if k not in left_out} | {"properties": kept}


def _num_optional(node: Schema) -> int:
    properties, required = node.get("properties"), node.get("required", [])
    if not (isinstance(properties, dict) and isinstance(required, list)):
        return 0  # not a schema
    return sum(name not in required for name in properties)


def _rebuilt(schema: Schema, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Applies `change` to each schema within the schema, inner ones first, and to itself."""
    return change({key: _rebuilt_value(key, value, change) for key, value in schema.items()})


def _rebuilt_value(
    keyword: str,
    value: Any,  # noqa: ANN401  # any JSON
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> Any:  # noqa: ANN401
    if keyword in _VALUES:
        return value
    if isinstance(value, dict) and keyword in _BY_NAME:
        return {name: _rebuilt_value("", schema, change) for name, schema in value.items()}
    if isinstance(value, dict):
        return _rebuilt(value, change)
    if isinstance(value, list):
        return [_rebuilt_value("", item, change) for item in value]
    return value


def _nodes(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Schema]]:  # noqa: ANN401
    """Yields (path, schema) of all schemas within a value, inner ones first, and of itself."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _nodes(item, (*path[:-1], f"{path[-1]}[{index}]"))
    if not isinstance(node, dict):
        return
    for keyword, value in node.items():
        if keyword in _BY_NAME and isinstance(value, dict):
            for name, schema in value.items():
                yield from _nodes(schema, (*path, keyword, name))
        elif keyword not in _VALUES:
            yield from _nodes(value, (*path, keyword))
    yield path, node


def _patterns(node: Schema) -> Iterator[str]:
    if isinstance(node.get("pattern"), str):
        yield node["pattern"]
    if isinstance(node.get("patternProperties"), dict):
        yield from node["patternProperties"]


def _parts(node: Schema) -> Iterator[tuple[str, Schema]]:
    """Yields (keyword, schema of that part alone) of what a grammar may be unable to express."""
    if isinstance(node.get("pattern"), str):
        yield "pattern", {"type": "string", "pattern": node["pattern"]}
    if isinstance(node.get("patternProperties"), dict):
        for name in node["patternProperties"]:
            yield "patternProperties", {"type": "string", "pattern": name}
    if isinstance(node.get("format"), str):
        yield "format", {"type": "string", "format": node["format"]}
    for keyword in sorted(_KEYWORDS & node.keys()):
        yield keyword, node


def _reason(keyword: str, node: Schema, error: str) -> str | None:
    """Returns why a part is invalid; None if another part within it may be the cause."""
    if keyword in {"pattern", "patternProperties"}:
        patterns = list(_patterns(node))
        if any(without_assertions(pattern) != pattern for pattern in patterns):
            return "look-around in a regular expression is not supported"
        return "this regular expression is not valid or not supported"
    if keyword == "format":
        return "this format is not supported"
    return f"{keyword} is not supported" if keyword in re.findall(r"\w+", error) else None


def _pattern_grammar(pattern: str) -> str:
    return json_schema_grammar({"type": "string", "pattern": pattern})


def _dotted(path: tuple[str, ...]) -> str:
    """The path, or its end if it is long. Only plain names appear in errors."""
    dotted = ".".join(name if _PLAIN_NAME.fullmatch(name) else "*" for name in path)
    return dotted if len(dotted) <= MAX_PATH_CHARS else f"...{dotted[-MAX_PATH_CHARS:]}"
