"""The OpenAPI document: everything is described, bounded and has examples, and it is true."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from model.text.tokenizer import Tokenizer
from service.api.http.context import ENDPOINTS, ApiLimits, Models
from service.api.http.observer import ApiObserver
from service.api.system.openapi import ERRORS, RULES, DocumentCache, operations
from service.app import build_app, served_model
from service.errors import QuireError
from service.http.exposure import extras_of
from service.messages import ModelCard
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from service.settings import Settings
from tests.api.bad_input_rows import CHAT, COMPLETIONS, RESPONSES, B, C, R
from tests.support.fakes import ALL_WELL

Json = dict[str, Any]

CARD = ModelCard(id="tiny-model", max_model_len=256, vocab_size=303, numeric_class="c", created=1)


@pytest.fixture(scope="module")
def document(tokenizer: Tokenizer) -> Json:
    """Made once: it takes tenths of a second."""
    app = build_app(
        MemoryQueue(QueueLimits()),
        Models.of(served_model(tokenizer, lambda: CARD)),
        probes=ALL_WELL,
        limits=ApiLimits(),
        observer=ApiObserver(),
        version="0.0.1",
        extras=("docs", "page"),
    )
    return dict(json.loads(json.dumps(app.openapi())))


def bodies(document: Json) -> Iterator[tuple[str, Json]]:
    """Yields (name, schema) of each body."""
    for path, method, operation in operations(document):
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]
            if path == "/v1/files":  # a form
                continue
            assert list(content) == ["application/json"], (path, method)
            name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
            yield name, document["components"]["schemas"][name]


def fields(document: Json, schema: Json, path: str = "") -> Iterator[tuple[str, Json, Json]]:
    """Yields (path, node, field) of each node of each field; it follows references."""
    waiting: list[tuple[str, Json, Json]] = [
        (f"{path}.{name}", field, field) for name, field in schema.get("properties", {}).items()
    ]
    seen = set()
    while waiting:
        where, node, field = waiting.pop()
        yield where, node, field
        reference = node.get("$ref", "").rpartition("/")[2]
        if reference and reference not in seen:
            seen.add(reference)
            yield from fields(document, document["components"]["schemas"][reference], where)
        for word in ("anyOf", "oneOf", "allOf"):
            waiting += [(where, inner, field) for inner in node.get(word, [])]
        for word in ("items", "additionalProperties"):
            if isinstance(node.get(word), dict):
                waiting.append((f"{where}[]", node[word], field))
        if "properties" in node:
            waiting += [(f"{where}.{k}", v, field) for k, v in node["properties"].items()]


def is_bounded(node: Json) -> bool:
    words = node.keys()
    match node.get("type"):
        case "string":
            return bool(words & {"enum", "const", "maxLength", "pattern"})
        case "integer" | "number":
            return bool(words & {"minimum", "exclusiveMinimum"}) and bool(
                words & {"maximum", "exclusiveMaximum"}
            )
        case "array":
            return "maxItems" in words
        case "object":
            return node.get("additionalProperties") is False or "maxProperties" in words
    return True


@pytest.mark.slow
def test_every_field_is_described_and_bounded(document: Json) -> None:
    assert len(dict(bodies(document))) >= 6
    undescribed, unbounded = set(), set()
    for name, schema in bodies(document):
        assert schema.get("description"), name
        assert schema["additionalProperties"] is False
        for path, node, field in fields(document, schema, name):
            if not (field.get("description") or "$ref" in field):
                undescribed.add(path)
            # A bound of the field also bounds a part without a bound of its own.
            if not is_bounded(node) and "maxProperties" not in field:
                unbounded.add(path)
    assert (undescribed, unbounded) == (set(), set())


@pytest.mark.slow
async def test_limits_are_those_that_are_configured(start_service: Any, small_limits: Any) -> None:
    limits = small_limits(max_choices=3, max_stop_chars=7, max_prompts=5)
    async with start_service(docs=True, limits=limits, max_model_len=99) as service:
        document = (await service.client.get("/openapi.json")).json()
        assert (await service.client.get("/openapi.json")).json() == document
    body = document["components"]["schemas"]["CompletionBody"]["properties"]
    assert body["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 3}
    assert body["max_tokens"]["anyOf"][0]["maximum"] == 99
    assert body["stop"]["anyOf"][0]["maxLength"] == 7
    assert body["prompt"]["anyOf"][1]["maxItems"] == 5
    assert body["prompt"]["anyOf"][2]["items"]["maximum"] == 302
    seed = body["seed"]["anyOf"][0]
    assert (seed["minimum"], seed["maximum"]) == (-(2**63), 2**64 - 1)


@pytest.mark.slow
async def test_every_example_is_answered(start_service: Any) -> None:
    async with start_service(docs=True) as service:
        document = (await service.client.get("/openapi.json")).json()
        for path, method, operation in operations(document):
            if "requestBody" not in operation or path == "/v1/files":  # that takes a form
                continue
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            name = schema["$ref"].rpartition("/")[2]
            examples = document["components"]["schemas"][name]["examples"]
            assert examples, name
            for example in examples:
                jsonschema_rs.validate({**schema, "components": document["components"]}, example)
                reply = await service.post(path, example)
                # Attention needs a network, a batch its input file, and this model generates.
                absent = ("attention_not_available", "file_not_found", "unsupported_model")
                known = any(code in reply.text for code in absent)
                assert reply.status_code == 200 or known, (method, path, reply.text)


@pytest.mark.slow
def test_every_rule_is_in_the_document(document: Json) -> None:
    """Rules name schemas: a renamed body would lose its own silently."""
    for name, rule in RULES.items():
        assert rule.items() <= document["components"]["schemas"][name].items(), name


def test_every_status_and_header_is_described(document: Json) -> None:
    for path, method, operation in operations(document):
        where = (method, path)
        assert operation["description"], where
        assert operation["summary"], where
        answers = operation["responses"]
        assert "200" in answers
        assert "500" in answers
        assert "422" not in answers, "FastAPI's own error shape never appears"
        assert not [status for status in answers if not status.isdecimal()]
        for answer in answers.values():
            assert answer["description"]
            assert "x-request-id" in answer["headers"]
            for header in answer["headers"].values():
                assert header["description"]
                assert header["schema"]
        for parameter in operation.get("parameters", []):
            assert parameter["description"], (where, parameter["name"])


def test_every_endpoint_that_computes_takes_the_headers_of_a_call(document: Json) -> None:
    for path in {path for paths in ENDPOINTS.values() for path in paths}:
        operation = document["paths"][path]["post"]
        streams = "text/event-stream" in operation["responses"]["200"]["content"]
        expected = {"idempotency-key", "x-request-timeout-ms"}
        expected |= {"x-quire-event-ids"} if streams else set()
        assert {each["name"] for each in operation["parameters"]} >= expected, path
        assert {"409", "410", "504"} <= operation["responses"].keys(), path


def test_every_answer_has_its_shape(document: Json) -> None:
    for path, method, operation in operations(document):
        for status, answer in operation["responses"].items():
            content = answer.get("content", {})
            assert content or status == "304", (method, path, status)
            assert all(kind["schema"] for kind in content.values()), (method, path, status)


@pytest.mark.slow
async def test_answers_have_the_documented_shapes(service: Any, document: Json) -> None:
    asked: list[tuple[str, Json]] = [
        (COMPLETIONS, B),
        (COMPLETIONS, B | {"logprobs": 2, "echo": True, "n": 2}),
        (CHAT, C | {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
        (CHAT, C | {"prompt_logprobs": 1}),
        (RESPONSES, R),
        (RESPONSES, R | {"background": True}),
        ("/v1/messages", {"model": B["model"], "max_tokens": 3, "messages": C["messages"]}),
        ("/v1/messages/count_tokens", {"model": B["model"], "messages": C["messages"]}),
        ("/tokenize", {"prompt": "hi", "return_token_strs": True}),
        ("/detokenize", {"tokens": [1, 2]}),
    ]
    for path, body in asked:
        reply = await service.post(path, body)
        _check_shape(document, "post", path, reply)
    for path in ("/v1/models", "/version", "/health", "/health/live", "/status"):
        _check_shape(document, "get", path, await service.client.get(path))
    reply = await service.client.get("/v1/models/tiny-model")
    _check_shape(document, "get", "/v1/models/{model}", reply)


def _check_shape(document: Json, method: str, path: str, reply: Any) -> None:
    assert reply.status_code == 200, reply.text
    answer = document["paths"][path][method]["responses"]["200"]
    schema = answer["content"]["application/json"]["schema"]
    jsonschema_rs.validate({**schema, "components": document["components"]}, reply.json())


def test_every_error_has_its_status() -> None:
    """The document covers all error classes."""
    found, waiting = set(), [QuireError]
    while waiting:
        error = waiting.pop()
        found.add(error.status)
        waiting += error.__subclasses__()
    # 405 answers methods that the document does not list.
    assert found - {405} <= ERRORS.keys()


async def test_the_document_is_not_served_unless_configured(service: Any) -> None:
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert (await service.client.get(path)).status_code == 404


def test_the_document_is_served_without_keys_or_if_configured() -> None:
    assert extras_of(Settings()) == {"docs", "page"}
    assert extras_of(Settings(page=False)) == {"docs"}
    assert extras_of(Settings(keys_file=Path("keys.toml"))) == {"page"}
    assert extras_of(Settings(keys_file=Path("keys.toml"), docs=True)) == {"docs", "page"}


async def test_the_document_is_made_once_and_off_the_event_loop() -> None:
    """It takes tenths of a second, which would delay the streams of other clients."""
    made: list[int] = []

    def make() -> Json:
        made.append(threading.get_ident())
        time.sleep(0.05)
        return {"number": len(made)}

    cache = DocumentCache(make)
    left = asyncio.create_task(cache.body(CARD))
    await asyncio.sleep(0.01)
    left.cancel()  # a client that leaves does not restart it for others
    bodies = await asyncio.gather(*(cache.body(CARD) for _ in range(8)))
    assert set(bodies) == {b'{"number":1}'}
    assert await cache.body(replace(CARD, max_model_len=9)) == b'{"number":2}'
    assert len(made) == 2
    assert threading.get_ident() not in made


def test_the_document_is_an_openapi_document(document: Json) -> None:
    assert document["openapi"].startswith("3.1")
    assert set(document["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
    for name, schema in document["components"]["schemas"].items():
        jsonschema_rs.meta.validate(schema)
        assert schema.get("description"), name
    text = json.dumps(document)
    for reference in set(text.split('"$ref": "#/components/schemas/')[1:]):
        assert reference.split('"')[0] in document["components"]["schemas"]
    assert ApiLimits().max_timeout_ms == _header(document, "x-request-timeout-ms")["maximum"]


def _header(document: Json, name: str) -> Json:
    parameters = document["paths"]["/v1/completions"]["post"]["parameters"]
    (found,) = (p["schema"] for p in parameters if p["name"] == name)
    return dict(found)
