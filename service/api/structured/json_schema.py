"""JSON schemas as grammars: what binds an answer, and what of it a grammar can express.

    binding       without remarks
    narrowed      without optional properties that are too many for the limits of a grammar
    uncounted     without limits that a lenient grammar gets wrong
    fitting       with patterns that a grammar can express
    first_wide    the property that is too wide, and why
    first_fault   the property that a grammar cannot express, and why

A schema that is not strict is relaxed: a pattern loses its look-around or, if that does not help,
goes; other keywords and formats that are not supported are ignored by a lenient grammar. What is
left out only allows more. A strict schema is refused by the name of the property. Whether a part
can be expressed is decided by a trial of that part alone.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any

from model.grammar import json_schema_grammar
from service.api.structured.validator import OVER_LIMITS, UNSUPPORTED_KEYWORDS

MAX_TRIALS = 64  # of parts of one schema
MAX_PATH_CHARS = 100
MAX_OPTIONAL = 150  # properties of one object

# A notation -> what is wrong with it, as the end of a sentence; None: nothing.
Trial = Callable[[str], Awaitable[str | None]]
Schema = Mapping[str, Any]
# A pattern -> what it is replaced by; None: it goes.
Replacements = Mapping[str, str | None]

# Keywords that bind nothing, that hold schemas by name, and that hold no schema.
_REMARKS = frozenset({"$comment", "default", "deprecated", "description", "examples", "title"})
_BY_NAME = frozenset(
    {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
)
_VALUES = frozenset({"const", "enum", "required"})
_KEYWORDS = UNSUPPORTED_KEYWORDS - {"format", "patternProperties"}
_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_PLAIN_NAME = re.compile(r"[\w$-]{1,64}(\[\d+\])*")


def binding(schema: Schema) -> dict[str, Any]:
    """A schema without remarks: the model has read them, and a grammar has no use for them."""
    return _rebuilt(schema, lambda node: {k: v for k, v in node.items() if k not in _REMARKS})


def uncounted(schema: Schema) -> dict[str, Any]:
    """A schema without limits on the number of properties if some of them are named and optional.

    A lenient grammar would count additional properties alone, and forbid what the schema allows.
    """
    return _rebuilt(schema, _uncounted)


def _uncounted(node: dict[str, Any]) -> dict[str, Any]:
    if not _num_optional(node):
        return node
    return {k: v for k, v in node.items() if k not in {"minProperties", "maxProperties"}}


def narrowed(schema: Schema) -> dict[str, Any]:
    """The schema without the optional properties of an object that has more than MAX_OPTIONAL."""
    return _rebuilt(schema, _narrowed)


def first_wide(schema: Schema) -> tuple[str, str] | None:
    """(dotted path, reason) of the first object that `narrowed` would change."""
    for path, node in _nodes(schema, ()):
        if _num_optional(node) > MAX_OPTIONAL:
            reason = f"an object may have at most {MAX_OPTIONAL} optional properties"
            return _dotted((*path, "properties")), reason
    return None


async def fitting(
    schema: Schema, trial: Trial, *, verdict: str, grammar_of: Callable[[Schema], str]
) -> Schema | None:
    """The schema with its patterns relaxed so that `grammar_of` it passes a trial; None if that
    fails. `verdict` is that of the schema as it is.
    """
    if verdict in OVER_LIMITS:
        return None
    replacements = await _replacements(schema, trial)
    for table in (replacements, dict.fromkeys(replacements)):
        relaxed = _rebuilt(schema, partial(_replaced, table=table))
        if await trial(grammar_of(relaxed)) is None:
            return relaxed
    return None


async def first_fault(schema: Schema, trial: Trial) -> tuple[str, str] | None:
    """(dotted path, reason) of the first part that a grammar cannot express, if one is found.

    Inner parts come before those that hold them. Names that are no plain words are written `*`.
    """
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    left = MAX_TRIALS
    for path, node in _nodes(binding(schema), ()):
        for keyword, part in _parts(node):
            if not left:
                return None
            left -= 1
            fault = await trial(json_schema_grammar({**definitions, **part}))
            if fault is not None and (reason := _reason(keyword, node, fault)):
                return _dotted((*path, keyword)), reason
    return None


def without_assertions(pattern: str) -> str:
    """The pattern without look-around and word boundaries: it matches at least as much."""
    kept: list[str] = []
    groups: list[bool] = []  # open ones; True: a look-around, which is left out
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


async def _replacements(schema: Schema, trial: Trial) -> dict[str, str | None]:
    """Those patterns of the schema that a grammar cannot express."""
    patterns = {
        pattern: None for _, node in _nodes(binding(schema), ()) for pattern in _patterns(node)
    }
    replacements: dict[str, str | None] = {}
    for index, pattern in enumerate(patterns):
        if index >= MAX_TRIALS:
            replacements[pattern] = None
        elif await trial(_pattern_grammar(pattern)) is not None:
            relaxed = without_assertions(pattern)
            usable = relaxed != pattern and await trial(_pattern_grammar(relaxed)) is None
            replacements[pattern] = relaxed if usable else None
    return replacements


def _replaced(node: dict[str, Any], table: Replacements) -> dict[str, Any]:
    """One schema with its own patterns replaced.

    Properties that match a pattern that goes are then allowed by nothing else, so all names are.
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


def _narrowed(node: dict[str, Any]) -> dict[str, Any]:
    """One schema; of very many optional properties it allows the names with any values."""
    if _num_optional(node) <= MAX_OPTIONAL:
        return node
    left_out = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
    required = node.get("required", [])
    kept = {name: value for name, value in node["properties"].items() if name in required}
    return {k: v for k, v in node.items() if k not in left_out} | {"properties": kept}


def _num_optional(node: Schema) -> int:
    properties, required = node.get("properties"), node.get("required", [])
    if not (isinstance(properties, dict) and isinstance(required, list)):
        return 0  # no schema
    return sum(name not in required for name in properties)


def _rebuilt(schema: Schema, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """The schema with `change` applied to each schema within it, inner ones first, and to it."""
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
    """All schemas within one, and itself, with their paths; inner ones first."""
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
    """(keyword, schema of that part alone) for what a grammar may fail to express."""
    if isinstance(node.get("pattern"), str):
        yield "pattern", {"type": "string", "pattern": node["pattern"]}
    if isinstance(node.get("patternProperties"), dict):
        for name in node["patternProperties"]:
            yield "patternProperties", {"type": "string", "pattern": name}
    if isinstance(node.get("format"), str):
        yield "format", {"type": "string", "format": node["format"]}
    for keyword in sorted(_KEYWORDS & node.keys()):
        yield keyword, node


def _reason(keyword: str, node: Schema, fault: str) -> str | None:
    """Why a part failed; None if another part of it may be the cause."""
    if keyword in {"pattern", "patternProperties"}:
        patterns = list(_patterns(node))
        if any(without_assertions(pattern) != pattern for pattern in patterns):
            return "look-around in a regular expression is not supported"
        return "this regular expression is not valid or not supported"
    if keyword == "format":
        return "this format is not supported"
    return f"{keyword} is not supported" if keyword in re.findall(r"\w+", fault) else None


def _pattern_grammar(pattern: str) -> str:
    return json_schema_grammar({"type": "string", "pattern": pattern})


def _dotted(path: tuple[str, ...]) -> str:
    """The path, or its end if it is long. Texts that are no names stay out of errors."""
    dotted = ".".join(name if _PLAIN_NAME.fullmatch(name) else "*" for name in path)
    return dotted if len(dotted) <= MAX_PATH_CHARS else f"...{dotted[-MAX_PATH_CHARS:]}"
