"""Parts that a grammar cannot express: relaxed, or rejected by name if the schema is strict."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from model.grammar import GrammarError, Grammars, json_schema_grammar
from service.api.structured.grammar import JsonRule
from service.api.structured.json_schema import (
    MAX_OPTIONAL,
    first_unsupported,
    relax,
    without_assertions,
)
from tests.laws.noise import EOS_IDS, TOKEN_BYTES, VOCAB_SIZE

CHAT = {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
# The pattern of `z.string().email()` in zod.
ZOD_EMAIL = (
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+"
    r"[A-Za-z]{2,}$"
)
EMAIL = {"type": "string", "format": "email", "pattern": ZOD_EMAIL}
CONTACT: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "to": {"type": "array", "items": EMAIL}},
    "required": ["name", "to"],
    "additionalProperties": False,
    "$schema": "http://json-schema.org/draft-07/schema#",
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=VOCAB_SIZE)


@pytest.fixture
async def service(start_service: Any) -> AsyncIterator[Any]:
    """A replica whose context has room for schemas."""
    async with start_service(max_model_len=2048) as started:
        yield started


def accepts(grammars: Grammars, grammar: str, text: str) -> bool:
    """Whether a grammar accepts a text, byte by byte."""
    matcher = grammars.matcher(grammar)
    ids = list(text.encode())
    if matcher.num_allowed(ids) < len(ids):
        return False
    for token in ids:
        matcher.read(token)
    return matcher.fulfilled


def tool(parameters: Any, *, name: str = "send", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


async def call(service: Any, **fields: Any) -> Any:
    return await service.post("/v1/chat/completions", CHAT | fields)


@pytest.mark.parametrize(
    ("pattern", "relaxed"),
    [
        (ZOD_EMAIL, ZOD_EMAIL.replace(r"(?!\.)(?!.*\.\.)", "")),
        (r"^(?=.*[a-z(?)])(?=(?:a|(b))\))\(x$", r"^\(x$"),
        (r"(?<=a)b(?<!c)(?:d)(?<e>f)", r"b(?:d)(?<e>f)"),
        (r"\bword\B[\b(?=]\\b", r"word[\b(?=]\\b"),
        ("[(?=a)]", "[(?=a)]"),
        ("a)(?=", "a)"),
        ("", ""),
        ("\\", "\\"),
    ],
)  # fmt: skip
def test_a_pattern_loses_its_assertions_and_nothing_else(pattern: str, relaxed: str) -> None:
    assert without_assertions(pattern) == relaxed


def test_without_assertions_a_pattern_matches_at_least_as_much() -> None:
    relaxed = without_assertions(ZOD_EMAIL)
    texts = ["a@b.cd", "a.b@c.de", ".a@b.cd", "a..b@c.de", "a@b", "@b.cd", "x+y'z@q-r.s.tu"]
    strict = [text for text in texts if re.search(ZOD_EMAIL, text)]
    loose = [text for text in texts if re.search(relaxed, text)]
    assert strict == ["a@b.cd", "a.b@c.de", "x+y'z@q-r.s.tu"]
    assert loose == ["a@b.cd", "a.b@c.de", ".a@b.cd", "a..b@c.de", "x+y'z@q-r.s.tu"]


async def test_a_tool_with_the_email_pattern_of_zod_is_accepted(
    service: Any, grammars: Grammars
) -> None:
    """The rest of the pattern and the other tools stay enforced."""
    tools = [tool(CONTACT), tool({"type": "object"}, name="other")]
    reply = await call(service, tools=tools, tool_choice="required")
    assert reply.status_code == 200, reply.text
    grammar = service.engine.seen[-1].grammar

    def spelled(arguments: Any) -> str:
        named = json.dumps({"name": "send", "arguments": arguments})
        return f"<tool_call>\n{named}\n</tool_call>"

    assert accepts(grammars, grammar, spelled({"name": "x", "to": ["a.b@c.de"]}))
    for wrong in ({"name": "x", "to": ["a b"]}, {"name": "x", "to": "a.b@c.de"}, {"name": "x"}):
        assert not accepts(grammars, grammar, spelled(wrong))


async def test_a_format_with_the_email_pattern_of_zod_is_accepted(
    service: Any, grammars: Grammars
) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": CONTACT}}
    assert (await call(service, response_format=asked)).status_code == 200
    grammar = service.engine.seen[-1].grammar
    assert accepts(grammars, grammar, '{"name": "x", "to": ["a.b@c.de"]}')
    assert not accepts(grammars, grammar, '{"name": "x", "to": ["ab"]}')
    reply = await call(service, response_format=asked, tools=[tool(CONTACT)])
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("tools[1].function.parameters.properties.to.items.pattern",
         {"tools": [tool({"type": "object"}, name="a"), tool(CONTACT, strict=True)]}),
        ("response_format.json_schema.schema.properties.to.items.pattern",
         {"response_format": {"type": "json_schema",
                              "json_schema": {"name": "x", "schema": CONTACT, "strict": True}}}),
        ("structured_outputs.json.properties.to.items.pattern",
         {"structured_outputs": {"json": CONTACT}}),
    ],
)  # fmt: skip
async def test_the_error_of_a_strict_schema_names_the_property(
    service: Any, path: str, fields: Any
) -> None:
    reply = await call(service, **fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "invalid_grammar", path)
    assert error["message"].startswith(f"{path}: look-around in a regular expression is not")
    assert len(error["message"]) < 300


async def test_other_endpoints_name_the_property_too(service: Any) -> None:
    form = {"type": "json_schema", "name": "x", "schema": CONTACT, "strict": True}
    body: dict[str, Any] = {"model": "tiny-model", "input": "hi", "text": {"format": form}}
    reply = await service.post("/v1/responses", body)
    assert reply.json()["error"]["param"] == "text.format.schema.properties.to.items.pattern"
    form["strict"] = False
    assert (await service.post("/v1/responses", body)).status_code == 200
    body = {"model": "tiny-model", "input": "hi", "tools": [
        {"type": "function", "name": "f", "parameters": CONTACT, "strict": True}]}  # fmt: skip
    reply = await service.post("/v1/responses", body)
    assert reply.json()["error"]["param"] == "tools[0].parameters.properties.to.items.pattern"


# Schemas of which a grammar cannot express a part: where that is, and an answer that is allowed
# only because the part is left out.
ONES: dict[str, Any] = {"type": "array", "uniqueItems": True}
SOME: dict[str, Any] = {"type": "object", "properties": {"b": {}}, "minProperties": 1}
NOT_A: dict[str, Any] = {"type": "string", "pattern": "^(?!a)"}
BEYOND: list[tuple[str, Any, Any]] = [
    ("pattern", {"type": "string", "pattern": "^(?=x)y$"}, "y"),
    ("pattern", {"type": "string", "pattern": r"^(a)\1$"}, "anything"),
    ("pattern", {"type": "string", "pattern": "^(?=a)*$"}, "anything"),
    ("pattern", {"type": "string", "pattern": "["}, "anything"),
    ("format", {"type": "string", "format": "iri"}, "anything"),
    ("anyOf[1].pattern", {"anyOf": [{"type": "null"}, NOT_A]}, "a"),
    ("$defs.mail.pattern", {"$ref": "#/$defs/mail", "$defs": {"mail": EMAIL}}, "a.b@c.de"),
    ("properties.pattern.pattern",
     {"type": "object", "properties": {"pattern": NOT_A}, "additionalProperties": False},
     {"pattern": "a"}),
    ("patternProperties",
     {"type": "object", "additionalProperties": False,
      "patternProperties": {"^(?!a)": {"type": "integer"}, "^a": {"type": "null"}}},
     {"b": 1, "a": None}),
    ("not", {"not": {"type": "string"}}, "anything"),
    ("properties.a.uniqueItems", {"type": "object", "properties": {"a": ONES}}, {"a": [1, 1]}),
    ("oneOf", {"oneOf": [{"type": "number"}, {"type": "integer"}]}, 1),
    ("properties.a.minProperties", {"properties": {"a": SOME}}, {"a": {}}),
    ("properties.a.minProperties", {"properties": {"a": SOME}}, {"a": {"b": 1}}),
    ("allOf[0].propertyNames",
     {"allOf": [{"type": "object", "propertyNames": {"pattern": "^a"}}]}, {}),
    ("properties.*.if", {"properties": {"a b": {"if": {"type": "string"}, "then": {}}}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "schema", "value"), BEYOND, ids=lambda value: str(value)[:40])
async def test_each_part_is_named_or_removed(
    grammars: Grammars, path: str, schema: Any, value: Any
) -> None:
    async def validate(grammar: str) -> str | None:
        try:
            grammars.matcher(grammar)
        except GrammarError as error:
            return str(error)
        return None

    def lenient(relaxed: Any) -> str:
        return JsonRule(relaxed, lenient=True).grammar

    assert await validate(json_schema_grammar(schema)) is not None
    found = await first_unsupported(schema, validate)
    assert found is not None
    assert found[0] == path
    relaxed = await relax(schema, validate, error="", grammar_of=lenient)
    assert relaxed is not None
    assert accepts(grammars, lenient(relaxed), json.dumps(value))


NAMES = {f"p{i}": {"type": "integer"} for i in range(300)}
WIDE = {"type": "object", "properties": NAMES, "required": ["p7"], "additionalProperties": False}


async def test_of_too_many_optional_properties_only_required_ones_are_enforced(
    service: Any, grammars: Grammars
) -> None:
    """The grammar may compile and still fail in the middle of an answer, where they are allowed."""
    schema = {"type": "object", "properties": {"deep": WIDE}, "required": ["deep"]}
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert (await call(service, response_format=asked)).status_code == 200
    grammar = service.engine.seen[-1].grammar
    assert accepts(grammars, grammar, '{"deep": {"p7": 1, "p3": 2, "p200": 3}}')
    assert not accepts(grammars, grammar, '{"deep": {"p7": "x"}}')
    assert not accepts(grammars, grammar, '{"deep": {"p3": 1}}')
    reply = await call(service, tools=[tool(schema)], tool_choice="required")
    assert reply.status_code == 400, "a prompt of 300 properties is too long for the model"
    assert reply.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("num", [MAX_OPTIONAL, MAX_OPTIONAL + 1])
async def test_a_strict_object_has_a_limit_of_optional_properties(
    service: Any, grammars: Grammars, num: int
) -> None:
    """Within the limit, answers can use all of them."""
    names = {"first": {"type": "null"}, **dict(list(NAMES.items())[:num])}
    schema = {"type": "object", "properties": names, "required": ["first"]}
    for fields, path in (
        ({"response_format": {"type": "json_schema",
                              "json_schema": {"schema": schema, "strict": True}}},
         "response_format.json_schema.schema.properties"),
        ({"structured_outputs": {"json": schema}}, "structured_outputs.json.properties"),
    ):  # fmt: skip
        reply = await call(service, **fields)
        if num == MAX_OPTIONAL:
            assert reply.status_code == 200, reply.text
            grammar = service.engine.seen[-1].grammar
            assert accepts(
                grammars, grammar, '{"first": null, "p0": 1, "p50": 1, "p99": 1, "x": 1}'
            )
        else:
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, path)
            assert f"at most {MAX_OPTIONAL} optional properties" in error["message"]


async def test_the_number_of_validations_is_bounded(grammars: Grammars) -> None:
    asked: list[str] = []

    async def validate(grammar: str) -> str | None:
        asked.append(grammar)
        return None if len(grammar) < 50_000 and "(?" not in grammar else "is not valid"

    schema = {"properties": {f"p{i}": {"pattern": f"(?!{i})[(?]"} for i in range(500)}}
    assert await relax(schema, validate, error="", grammar_of=json_schema_grammar)
    assert await first_unsupported(schema, validate)
    assert len(asked) < 2 * 64 + 5


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"type": "object", "properties": []}])
async def test_what_is_not_a_schema_is_rejected_strict_or_not(service: Any, schema: Any) -> None:
    for strict in (True, False):
        asked = {"type": "json_schema", "json_schema": {"schema": schema, "strict": strict}}
        assert (await call(service, response_format=asked)).status_code == 400
