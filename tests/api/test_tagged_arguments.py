"""Arguments as elements: each sample of their grammar is read as JSON that matches the schema."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs
import pytest

from service.api.tools.arguments import PARAMETER_END
from service.api.tools.chat import FunctionDefinition, ToolUse
from service.api.tools.formats import TOOL_FORMATS
from service.api.tools.grammar import tools_grammar
from service.api.tools.parser import KnownTools, ToolCallParser
from service.api.tools.tagged import first_inexpressible, parameter_types
from tests.api.samples import fulfils, sample

END = PARAMETER_END.encode()
CODER = TOOL_FORMATS["qwen3-coder"]


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "none": closed(),
    "text": closed("a", a={"type": "string", "maxLength": 5}, b={"type": "string", "minLength": 2}),
    "choice": closed("a", "b", a={"enum": ["x", "\n", '"']}, b={"const": "only"}),
    "json": closed(
        "a",
        "c",
        a={"type": "integer", "minimum": 3, "maximum": 40},
        b={"type": "array", "items": {"enum": [True, None, "x\n"]}, "maxItems": 2},
        c={"$ref": "#/$defs/c"},
    )
    | {"$defs": {"c": closed("d", d={"type": "boolean"})}},
    "optional": closed(
        "a",
        "b",
        "c",
        a={"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]},
        b={"anyOf": [{"const": "}\n"}, {"enum": [1, "1", "x"]}, {"type": "boolean"}]},
        c={"$ref": "#/$defs/c"},
    )
    | {"$defs": {"c": {"type": ["null", "string"], "minLength": 2, "maxLength": 3}}},
    "several": closed("a", "b", a={"type": ["string", "null"]}, b={}),
    "unnamed": {"type": "object", "required": ["z"]},
}


def grammar_of(schema: dict[str, Any], *, strict: bool = False) -> str:
    function = FunctionDefinition(name="f", parameters=schema, strict=strict)
    use = ToolUse(functions=(function,), may_call=(0,), forced=True, parallel=False)
    return tools_grammar(use, CODER, {})


def called(text: str, schema: dict[str, Any]) -> Any:
    tools = KnownTools(types={"f": parameter_types(schema)})
    parser = ToolCallParser(CODER, request_id="r", tools=tools)
    (call,) = parser.push(text).calls
    assert parser.called, text
    return json.loads(call.arguments)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_samples_match_the_schema(name: str, strict: bool) -> None:
    schema = SCHEMAS[name]
    ended = 0
    for seed in range(8):
        text = sample(grammar_of(schema, strict=strict), random.Random(seed), often=END)
        if text is not None:
            ended += 1
            jsonschema_rs.validate(schema, called(text, schema))
    assert ended, "no sample has ended"


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"a": "", "b": 1}, True),
        ({"a": "null", "b": "x</parameter>\n"}, True),
        ({"a": None, "b": [1, {"c": "\n"}]}, True),
        ({"b": 1}, False),
        ({"a": "x", "b": "y", "c": 1}, False),
    ],
)
def test_arguments_in_their_order(arguments: dict[str, Any], allowed: bool) -> None:
    schema = SCHEMAS["several"]
    text = CODER.render([("f", json.dumps(arguments))])
    assert fulfils(grammar_of(schema), text) == allowed
    expected = arguments | ({"a": None} if arguments.get("a") == "null" else {})
    if allowed:
        assert called(text, schema) == expected


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "properties.a.pattern"),
        ({"properties": {"a": {"type": ["string", "null"], "maxLength": 3}}}, None),
        ({"properties": {"a": {"anyOf": [{"type": "string"}]}}}, None),
        ({"properties": {"a": {"type": ["string", "integer"]}}}, None),
        ({"properties": {"a": {"type": ["string", "integer"], "minimum": 3}}}, "properties.a"),
        ({"properties": {"a": {"anyOf": [{"type": "string", "format": "date"}]}}},
         "properties.a.format"),
        ({"properties": {"a\n": {}}}, "properties.a\n"),
        ({"anyOf": [{}]}, "anyOf"),
        ({"properties": {"a": {"type": "array", "items": {"pattern": "x"}}}}, None),
        ({"properties": {"a": {"type": "string", "title": "A", "maxLength": 3}}}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_what_a_strict_schema_may_not_have(schema: dict[str, Any], path: str | None) -> None:
    found = first_inexpressible(schema)
    assert (found and found[0]) == path
