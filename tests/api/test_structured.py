"""Structured output at the API: from fields to a grammar, and what is rejected at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from model.grammar import (
    choice_grammar,
    gbnf_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from service.api.structured.validator import MAX_CHARS
from service.messages import FinishReason

CHAT = {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TEXT = {"model": "tiny-model", "prompt": "hi", "max_tokens": 4}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


ACCEPTED = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, json_object_grammar()),
    ({"response_format": schema_format(SCHEMA, strict=True)}, json_schema_grammar(SCHEMA)),
    ({"response_format": schema_format(SCHEMA, description="d")}, json_schema_grammar(SCHEMA)),
    ({"structured_outputs": {"json": SCHEMA}}, json_schema_grammar(SCHEMA)),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, json_schema_grammar(SCHEMA)),
    ({"structured_outputs": {"json_object": True}}, json_object_grammar()),
    ({"structured_outputs": {"regex": r"[\^$]\$\d+"}}, regex_grammar(r"[\^$]\$\d+")),
    ({"structured_outputs": {"choice": ["é", 'a"b', "c\n"]}}, choice_grammar(["é", 'a"b', "c\n"])),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, lark_grammar('start: "a"')),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, gbnf_grammar('root ::= "a"')),
]


@pytest.mark.parametrize(("fields", "notation"), ACCEPTED, ids=str)
async def test_a_field_becomes_a_grammar(service: Any, fields: Any, notation: str | None) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        reply = await service.post(path, body | fields)
        assert reply.status_code == 200, reply.text
        assert service.engine.seen[-1].grammar == notation


# What is refused, by the field that is to blame.
IN_SCHEMA = "response_format.json_schema.schema"
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("response_format", {"response_format": schema_format({"type": "stsring"})}),
    (f"{IN_SCHEMA}.pattern",
     {"response_format": schema_format({"type": "string", "pattern": "(?=a)"}, strict=True)}),
    (f"{IN_SCHEMA}.pattern",
     {"response_format": schema_format({"type": "string", "pattern": "["}, strict=True)}),
    (f"{IN_SCHEMA}.not",
     {"response_format": schema_format({"not": {"type": "string"}}, strict=True)}),
    ("structured_outputs.json.properties.a.items[1].format",
     {"structured_outputs": {"json": {"properties": {"a": {
         "items": [{}, {"type": "string", "format": "x"}]}}}}}),
    ("response_format", {"response_format": schema_format({"$ref": "http://127.0.0.1/x"})}),
    ("response_format", {"response_format": schema_format({"enum": []})}),
    ("response_format", {"response_format": schema_format({"$ref": "#"})}),
    ("response_format", {"response_format": schema_format({"enum": ["a" * MAX_CHARS]})}),
    ("response_format", {"response_format": {"type": "json_schema"}}),
    ("response_format", {"response_format": schema_format(SCHEMA) | {"type": "json_object"}}),
    ("response_format.type", {"response_format": {"type": "yaml"}}),
    ("response_format.type", {"response_format": {}}),
    ("response_format", {"response_format": "json"}),
    ("response_format.json_schema.schema", {"response_format": schema_format([])}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "(a+)+$"}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "^a"}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "(?=a)"}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": r"(a)\1"}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "["}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": ""}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "a" * 2**20}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "(" * 30_000 + ")" * 30_000}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": 5}}),
    ("structured_outputs.choice", {"structured_outputs": {"choice": []}}),
    ("structured_outputs.choice[1]", {"structured_outputs": {"choice": ["a", 5]}}),
    ("structured_outputs.choice", {"structured_outputs": {"choice": ["a"] * 10**5}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": "start: ("}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": "a: b"}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": "root ::= ("}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": "start: start"}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": '%llguidance {}\nstart: "'}}),
    ("structured_outputs.json", {"structured_outputs": {"json": "{"}}),
    ("structured_outputs.json", {"structured_outputs": {"json": "[" * 30_000}}),
    ("structured_outputs", {"structured_outputs": {}}),
    ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["a"]}}),
    ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "x"}}),
    ("structured_outputs", {"structured_outputs": {"regex": "a"},
                            "response_format": {"type": "json_object"}}),
    ("min_tokens", {"structured_outputs": {"regex": "a"}, "min_tokens": 1}),
    ("ignore_eos", {"structured_outputs": {"regex": "a"}, "ignore_eos": True}),
]  # fmt: skip


@pytest.mark.parametrize(("param", "fields"), REFUSED, ids=lambda value: str(value)[:60])
async def test_a_bad_grammar_is_a_400(service: Any, param: str, fields: dict[str, Any]) -> None:
    reply = await service.post("/v1/chat/completions", CHAT | fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 200
    assert not service.engine.seen


async def test_a_completion_can_have_a_bad_grammar_too(service: Any) -> None:
    reply = await service.post("/v1/completions", TEXT | {"structured_outputs": {"regex": "("}})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_grammar")


async def test_a_response_has_a_format_too(service: Any) -> None:
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    body = {"model": "tiny-model", "input": "hi", "max_output_tokens": 4}
    reply = await service.post("/v1/responses", body | {"text": {"format": form}})
    assert reply.status_code == 200
    assert reply.json()["text"] == {"format": form}
    assert service.engine.seen[-1].grammar == json_schema_grammar(SCHEMA)
    bad = form | {"schema": {"type": "stsring"}}
    reply = await service.post("/v1/responses", body | {"text": {"format": bad}})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "text.format")


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"type": "string", "format": "secret-format"}, "format"),
        ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "Properties"),
    ],
)
async def test_unsupported_keywords_are_named(service: Any, schema: Any, named: str) -> None:
    reply = await service.post(
        "/v1/chat/completions", CHAT | {"response_format": schema_format(schema, strict=True)}
    )
    message = reply.json()["error"]["message"]
    assert named in message
    assert "secret" not in message


async def test_a_rejected_grammar_is_not_echoed_to_the_client(service: Any) -> None:
    secrets = [
        {"type": "hunter2"},
        {"type": "string", "pattern": "(hunter2"},
        {"$ref": "#/hunter2"},
        {"properties": {"the hunter2": {"pattern": "(?=hunter2)"}}},
        {"patternProperties": {"(?=hunter2)": {"type": "string"}}},
        {"type": "string", "format": "hunter2"},
    ]
    for schema in secrets:
        body = CHAT | {"response_format": schema_format(schema, strict=True)}
        reply = await service.post("/v1/chat/completions", body)
        assert reply.status_code == 400
        assert "hunter2" not in reply.text


async def test_an_answer_whose_grammar_fails_is_an_error(service: Any) -> None:
    service.engine.end, service.engine.error = FinishReason.ERROR, "grammar_failed"
    reply = await service.post("/v1/completions", TEXT | {"structured_outputs": {"regex": "a*"}})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (500, "grammar_failed")
    assert "grammar" in error["message"]


# Each takes minutes, gigabytes or the whole stack of a process that compiles it.
BOMBS: dict[str, dict[str, Any]] = {
    "stack": {
        "grammar": "start: r0\n"
        + "".join(f'r{i}: "x" r{i + 1}\n' for i in range(3500))
        + 'r3500: "y"'
    },
    "remainders": {"json": {"type": "integer", "multipleOf": 999_983}},
    "ands": {"json": {"type": "string", "allOf": [{"pattern": f".*{i}"} for i in range(2000)]}},
    "optional": {"regex": "(.*a)?" * 10_000},
    "dots": {"grammar": "start: A\nA: " + " & ".join(f"/.*{i}.*/" for i in range(3000))},
    "rows": {"json": {"anyOf": [{"properties": {"a": {"const": i}}} for i in range(1500)]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_is_a_400_and_blocks_no_other_request(service: Any, name: str) -> None:
    """The event loop keeps running, and good grammars are accepted afterwards."""
    exploding = asyncio.create_task(
        service.post("/v1/completions", TEXT | {"structured_outputs": BOMBS[name]})
    )
    turns = 0
    while not exploding.done():
        assert (await service.post("/v1/completions", TEXT)).status_code == 200
        turns += 1
    assert exploding.result().status_code == 400
    assert "too complex" in exploding.result().json()["error"]["message"]
    assert turns >= 3
    good = TEXT | {"structured_outputs": {"choice": [f"good after {name}"]}}
    assert (await service.post("/v1/completions", good)).status_code == 200


@pytest.mark.slow
async def test_a_killed_process_is_not_an_error_of_the_grammar(service: Any) -> None:
    validator = service.app.state.context.models.first.grammars
    for index in range(2):
        body = TEXT | {"structured_outputs": {"choice": [f"killed {index}"]}}
        assert (await service.post("/v1/completions", body)).status_code == 200
        os.kill(validator._process.pid, signal.SIGKILL)
        validator._process.wait()
