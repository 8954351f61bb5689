"""Document: what /openapi.json says, with what the framework cannot know of the routes.

FastAPI's document has routes, fields and the limits that never change. Added here are the limits
that are configured or the model's, headers, every status that an endpoint answers with, the shapes
of answers, and an example of each body. Nothing here decides anything: `test_openapi` holds it to
what the server does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.api.anthropic.errors import is_message_path
from service.api.auth import OPEN_PATHS, is_counted
from service.api.context import ApiContext
from service.api.limits import ApiLimits
from service.api.system.docs import DocumentCache
from service.api.system.document_answers import ANSWERS, SHAPES
from service.api.system.document_errors import error_answers
from service.api.system.document_rules import RULES
from service.messages import ModelCard

Json = dict[str, Any]

_METHODS = ("get", "post", "delete")
_BODIES = "application/json"
_EVENTS = "text/event-stream"
_MAX_INT = 2**31 - 1
_MAX_NAME = 256  # what is longer is no id, no model and no file
_SCHEMES: Json = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "As OpenAI's clients send it."},
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "As Anthropic's clients send it.",
    },
}


def install(app: FastAPI, context: ApiContext) -> None:
    """Makes `app` serve the whole document, for the model that is served when it is asked for."""
    made: dict[ModelCard, Json] = {}

    def document() -> Json:
        card = context.card
        if card not in made:
            made.clear()
            plain = get_openapi(title=app.title, version=app.version, routes=app.routes)
            made[card] = complete(plain, limits=context.limits, card=card)
        return made[card]

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI means it to be done
    app.state.document = DocumentCache(document)


def complete(document: Json, *, limits: ApiLimits, card: ModelCard) -> Json:
    """`document`, changed in place, with all that is missing."""
    schemas = document["components"]["schemas"]
    document["components"]["securitySchemes"] = _SCHEMES
    schemas["MessageErrorBody"] = _MESSAGE_ERROR
    schemas |= ANSWERS
    for name in _body_schemas(document):
        _bound_fields(schemas[name], limits=limits, card=card)
        schemas[name] |= RULES.get(name, {})
        if name in _EXAMPLES:
            example = dict(_EXAMPLES[name])
            if "model" in schemas[name]["properties"]:
                example["model"] = card.id
            schemas[name]["examples"] = [example]
    for path, method, operation in operations(document):
        _complete_operation(operation, path, limits=limits)
        _shape_answer(operation["responses"]["200"], SHAPES.get((method, path)))
    return document


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """(path, method, operation) of all of them."""
    for path, methods in document["paths"].items():
        for method in _METHODS:
            if method in methods:
                yield path, method, methods[method]


# --- operations ---------------------------------------------------------------------------


def _complete_operation(operation: Json, path: str, *, limits: ApiLimits) -> None:
    answers = operation["responses"]
    answers.pop("4XX", None)
    has_body = "requestBody" in operation
    generates = has_body and _EVENTS in answers["200"].get("content", {})
    if not _is_open(path):
        operation["security"] = [{name: []} for name in _SCHEMES] + [{}]
    if generates:
        operation.setdefault("parameters", []).extend(_call_headers(limits))
    if path.startswith("/web") or path == "/":
        _describe_page(answers, path)
    for parameter in operation.get("parameters", []):
        _bound_parameter(parameter, limits)
    statuses = _statuses(path, has_body=has_body, generates=generates)
    shape = "MessageErrorBody" if is_message_path(path) else "ErrorBody"
    answers |= error_answers(sorted(statuses), shape)
    for status, answer in answers.items():
        answer.setdefault("headers", {})["x-request-id"] = _REQUEST_ID
        if generates and status in {"200", "429"}:
            answer["headers"] |= _RATES


def _shape_answer(answer: Json, shape: str | None) -> None:
    content = answer.get("content", {})
    if shape is not None:
        content[_BODIES] = {"schema": {"$ref": f"#/components/schemas/{shape}"}}
    elif _EVENTS in content:
        content.pop(_BODIES, None)
    if _EVENTS in content:
        content[_EVENTS] = {"schema": {"$ref": "#/components/schemas/StreamEvent"}}
    answer["content"] = content


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/web/")


def _statuses(path: str, *, has_body: bool, generates: bool) -> set[int]:
    """The errors that an endpoint may answer with."""
    found = {403, 414, 431, 500} if _is_open(path) else {401, 403, 414, 431, 500}
    if not _is_open(path) and is_counted(path):
        found |= {429, 503}
    if has_body:
        found |= {400, 404, 408, 413, 415}
    if generates:
        found |= {409, 410, 504}
    if "{" in path:
        found |= {404}
    if path.startswith(("/v1/streams/", "/v1/responses/")):
        found |= {400, 409, 410}
    if path.startswith("/health"):
        found |= {503}
    return found


def _call_headers(limits: ApiLimits) -> list[Json]:
    """What may be said of a generating call beside its body."""
    return [
        {
            "name": "x-request-timeout-ms",
            "in": "header",
            "description": "Milliseconds that the answer may take. Then 504, or what there is.",
            "schema": {"type": "integer", "minimum": 1, "maximum": limits.max_timeout_ms},
            "example": 60_000,
        },
        {
            "name": "idempotency-key",
            "in": "header",
            "description": "The same key with the same body gives the one answer of both.",
            "schema": {
                "type": "string",
                "pattern": "^[!-~]+$",
                "minLength": 1,
                "maxLength": limits.max_key_chars,
            },
            "example": "order-4711",
        },
        {
            "name": "x-quire-event-ids",
            "in": "header",
            "description": "1: events carry ids, and the stream can be resumed after any of them.",
            "schema": {"type": "string", "enum": ["0", "1"]},
            "example": "1",
        },
    ]


def _bound_parameter(parameter: Json, limits: ApiLimits) -> None:
    most = {"path": _MAX_NAME, "query": limits.max_event_id_chars}.get(parameter["in"])
    for schema in parameter["schema"].get("anyOf", [parameter["schema"]]):
        if schema.get("type") == "string" and most is not None:
            schema["maxLength"] = most
        _use_integers(schema)


def _describe_page(answers: Json, path: str) -> None:
    kinds = ("text/html",) if path == "/" else ("text/javascript", "text/css", "image/svg+xml")
    kinds = kinds if path == "/" else (*kinds, "text/html")
    text = {"schema": {"type": "string"}}
    answers["200"]["content"] = dict.fromkeys(kinds, text)
    answers["200"]["headers"] = {"etag": _header("Changes with the content.")}
    answers["304"] = {"description": "The copy that the browser has is good."}


# --- the fields of bodies -----------------------------------------------------------------


def _body_schemas(document: Json) -> list[str]:
    """The names of the schemas that bodies are made of."""
    found: dict[str, None] = {}
    waiting: list[Any] = [
        operation["requestBody"] for _, _, operation in operations(document)
        if "requestBody" in operation
    ]  # fmt: skip
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            name = str(node.get("$ref", "")).rpartition("/")[2]
            if name and name not in found:
                found[name] = None
                waiting.append(document["components"]["schemas"][name])
            waiting += node.values()
    return list(found)


def _bound_fields(schema: Json, *, limits: ApiLimits, card: ModelCard) -> None:
    """Gives each field the limits that are not in its type."""
    above = _most(limits, card)
    ids = {
        "prompt": card.vocab_size - 1,
        "tokens": card.vocab_size - 1,
        "stop_token_ids": card.vocab_size - 1,
        "positions": card.max_model_len - 1,
    }
    sizes = {
        "stop": (limits.max_stop_strings, limits.max_stop_chars),
        "stop_sequences": (limits.max_stop_strings, limits.max_stop_chars),
        "stop_token_ids": (limits.max_stop_token_ids, None),
    }
    for name, field in schema.get("properties", {}).items():
        if name == "chat_template_kwargs" and "prompt" not in schema["properties"]:
            field["anyOf"][0] = _template_options(limits)  # beside a prompt nobody looks at them
        if name == "prompt" and len(field["anyOf"]) == 4:
            for lists in (field["anyOf"][1], field["anyOf"][3]):
                lists["maxItems"] = limits.max_prompts
        if name == "seed":
            field["anyOf"][0] |= {"minimum": -(2**63), "maximum": 2**64 - 1}
        items, chars = sizes.get(name, (None, None))
        for node in _nodes(field):
            kind = node.get("type")
            if kind == "integer" and not node.keys() & {"maximum", "exclusiveMaximum"}:
                node["maximum"] = ids.get(name, above.get(name, _MAX_INT))
            elif kind == "array":
                most = limits.max_body_bytes // 2 if items is None else items
                node["maxItems"] = min(node.get("maxItems", most), most)
            elif kind == "string" and not node.keys() & {"enum", "const", "pattern", "maxLength"}:
                node["maxLength"] = limits.max_body_bytes if chars is None else chars
            elif kind == "object" and node.get("additionalProperties") is True:
                node["maxProperties"] = limits.max_body_bytes // 5
            _use_integers(node)


def _most(limits: ApiLimits, card: ModelCard) -> dict[str, int]:
    """The greatest value of each integer whose limit is configured or the model's."""
    lengths = ("min_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens")
    return {
        **dict.fromkeys(lengths, card.max_model_len),
        "n": limits.max_choices,
        "best_of": limits.max_choices,
        "logprobs": limits.max_logprobs,
        "top_logprobs": limits.max_top_logprobs,
        "prompt_logprobs": limits.max_top_logprobs,
    }


def _template_options(limits: ApiLimits) -> Json:
    return {
        "type": "object",
        "properties": {
            name: {"type": "boolean", "description": "As the model's chat template has it."}
            for name in sorted(limits.template_kwargs)
        },
        "additionalProperties": False,
    }


def _nodes(schema: Json) -> Iterator[Json]:
    """A schema and those within it; what is referred to is elsewhere."""
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            yield node
            waiting += [value for value in node.values() if isinstance(value, dict | list)]


def _use_integers(schema: Json) -> None:
    """FastAPI writes `0.0` where a limit is 0."""
    if schema.get("type") == "integer":
        for word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if word in schema:
                schema[word] = int(schema[word])


# --- texts --------------------------------------------------------------------------------


def _header(description: str, **schema: Any) -> Json:  # noqa: ANN401  # words of JSON Schema
    return {"description": description, "schema": {"type": "string", **schema}}


_REQUEST_ID = _header("The call's id: in logs, and what it is resumed or cancelled by.")
_RATES = {
    f"x-ratelimit-{word}-{unit}": _header(f"{text} Only where the key has a limit on {unit}.")
    for unit in ("requests", "tokens")
    for word, text in (
        ("limit", "How many a minute."),
        ("remaining", "How many are left of it."),
        ("reset", "When all of it is back, such as 820ms or 2m4.5s."),
    )
}
_MESSAGE_ERROR: Json = {
    "type": "object",
    "title": "MessageErrorBody",
    "description": "An error as Anthropic's clients know it.",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error", "description": "Tells it from an answer."},
        "error": {
            "type": "object",
            "description": "What is wrong.",
            "required": ["type", "message"],
            "properties": {
                "type": {"type": "string", "description": "The kind of error."},
                "message": {"type": "string", "description": "For people."},
                "code": {"type": "string", "description": "Only `shutting_down`."},
                "request_id": {"type": "string", "description": "The call to read on elsewhere."},
                "last_event_id": {"type": "string", "description": "The event to read on after."},
            },
        },
    },
}
_CHAT = [{"role": "user", "content": "Name three colours."}]
_EXAMPLES: dict[str, Json] = {
    "CompletionBody": {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
    "ChatBody": {"messages": _CHAT, "max_tokens": 40, "temperature": 0},
    "ResponseBody": {"input": "Name three colours.", "max_output_tokens": 40, "temperature": 0},
    "MessageBody": {"messages": _CHAT, "max_tokens": 40, "temperature": 0},
    "CountBody": {"messages": _CHAT},
    "TokenizeBody": {"prompt": "Hello, world"},
    "DetokenizeBody": {"tokens": [1, 2, 3]},
    "AttentionBody": {"prompt": "Hello, world", "layer": 0, "head": 0},
}
