"""GET /openapi.json and /docs: the OpenAPI document, and a page that lists its endpoints.

FastAPI derives routes, fields and answers from the pydantic models. Added here are the limits that
the settings or the model determine, headers, the errors of each endpoint, and an example of each
body. The document takes tenths of a second, so a thread makes it, once per model card.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from html import escape
from types import MappingProxyType
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi

from service.api.http.auth import OPEN_PATHS, is_counted
from service.api.http.context import ENDPOINTS, ApiContext, ApiLimits, Context, from_app
from service.api.http.models import EVENTS, MAX_INT
from service.api.system.page import HEADERS
from service.messages import ModelCard

Json = dict[str, Any]

_NULL = {"type": "null"}


def _when(name: str, value: object, then: Json, otherwise: Json) -> Json:
    condition = {"properties": {name: {"const": value}}, "required": [name]}
    return {"if": condition, "then": then, "else": otherwise}


def _present(name: str) -> Json:
    return {"properties": {name: {"not": _NULL}}, "required": [name]}


def _absent(*names: str) -> Json:
    return {"properties": dict.fromkeys(names, _NULL)}


def _one_of(*names: str) -> Json:
    """Exactly one of these is given."""
    return {
        "oneOf": [
            {"allOf": [_present(name), _absent(*(other for other in names if other != name))]}
            for name in names
        ]
    }


_STREAM_OPTIONS = {
    "if": _present("stream_options"),
    "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
}
_NOT_ASSISTANT = {
    "allOf": [
        _present("content"),
        {"properties": {"content": {"not": {"const": []}}}},
        _absent("tool_calls", "reasoning_content", "reasoning"),
    ]
}

RULES: Mapping[str, Json] = MappingProxyType({
    "Message": {
        "allOf": [
            _when("role", "tool", _present("tool_call_id"), _absent("tool_call_id")),
            _when("role", "assistant", {}, _NOT_ASSISTANT),
        ]
    },
    "InputMessage": _when("role", "assistant", {}, _NOT_ASSISTANT),
    "Turn": _when("role", "assistant", {}, _present("content")),
    "MessageToolChoice": _when("type", "tool", _present("name"), _absent("name")),
    "ResponseFormat": _when("type", "json_schema", _present("json_schema"), _absent("json_schema")),
    "TokenizeBody": _one_of("prompt", "messages"),
    "AttentionBody": _one_of("prompt", "messages", "tokens"),
    "StructuredOutputs": _one_of("json", "json_object", "regex", "choice", "grammar"),
    "CompletionBody": _STREAM_OPTIONS,
    "ChatBody": _STREAM_OPTIONS,
})  # fmt: skip
"""Component -> the rule that joins its fields."""

DOCUMENT = "/openapi.json"
router = APIRouter(include_in_schema=False)

_COMPUTING = frozenset(path for paths in ENDPOINTS.values() for path in paths)
_MAX_NAME = 256  # characters of an id, a model's name or a file's name
_INTEGER_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


class DocumentCache:
    """The rendered document of the model that is served now."""

    def __init__(self, make: Callable[[], Json]) -> None:
        self._make = make
        self._card: ModelCard | None = None
        self._rendering: asyncio.Task[bytes] | None = None

    async def body(self, card: ModelCard) -> bytes:
        """The document as JSON. Requests that arrive while it is made wait for the same bytes."""
        if self._rendering is None or card != self._card:
            self._card = card
            render = asyncio.to_thread(lambda: orjson.dumps(self._make()))
            self._rendering = asyncio.create_task(render)
        return await asyncio.shield(self._rendering)  # a client that leaves does not cancel it


Cache = Annotated[DocumentCache, from_app("document")]


@router.get(DOCUMENT)
async def show_document(cache: Cache, context: Context) -> Response:
    return Response(await cache.body(context.models.first.card), media_type="application/json")


@router.get("/docs")
async def show_docs(cache: Cache, context: Context) -> Response:
    """The endpoints, and a link to the document for tools that show more. The page loads nothing
    else: neither scripts nor files of other servers.
    """
    document = orjson.loads(await cache.body(context.models.first.card))
    return Response(_listing(document), media_type="text/html; charset=utf-8", headers=HEADERS)


def _listing(document: Json) -> str:
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    rows = "".join(
        f"<tr><td>{method.upper()}<td><code>{escape(path)}</code><td>{escape(about['description'])}"
        for path, methods in document["paths"].items()
        for method, about in methods.items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" '
        'content="light dark"><meta name="viewport" content="width=device-width">'
        f"<title>{title}: endpoints</title><main><h1>{title}</h1>"
        f'<p>The whole API with all fields is in <a href="{DOCUMENT}">{DOCUMENT}</a> (OpenAPI).</p>'
        f"<table><thead><tr><th>Method<th>Path<th>Description<tbody>{rows}</table></main></html>"
    )


def install(app: FastAPI, context: ApiContext) -> None:
    """Makes `app` serve the document of the model that is current at the time of the request."""

    def document() -> Json:
        plain = get_openapi(title=app.title, version=app.version, routes=app.routes)
        return complete(plain, limits=context.limits, card=context.models.first.card)

    app.openapi = document  # type: ignore[method-assign]  # FastAPI documents this
    app.state.document = DocumentCache(document)


def complete(document: Json, *, limits: ApiLimits, card: ModelCard) -> Json:
    """Adds to `document`, in place, what FastAPI cannot derive."""
    schemas = document["components"]["schemas"]
    document["components"]["securitySchemes"] = _SCHEMES
    for path, _, operation in operations(document):
        _complete_operation(operation, path, limits=limits)
    for name, schema in schemas.items():
        if schema.get("additionalProperties") is False:  # part of a body; answers are open
            _bound_fields(schema, limits=limits, card=card)
            schema.update(RULES.get(name, {}))
        if name in _EXAMPLES:
            model = {"model": card.id} if "model" in schema["properties"] else {}
            schema["examples"] = [_EXAMPLES[name] | model]
    for node in _nodes(document):  # FastAPI writes `0.0` if a limit is 0
        if node.get("type") == "integer":
            node |= {word: int(node[word]) for word in _INTEGER_LIMITS if word in node}
    return document


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """Yields (path, method, operation) for each operation."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _complete_operation(operation: Json, path: str, *, limits: ApiLimits) -> None:
    answers, parameters = operation["responses"], operation.get("parameters", [])
    is_open = path in OPEN_PATHS or path.startswith("/web/")
    content = answers["200"]["content"]
    if content.get("application/json") == {"schema": {}}:  # FastAPI's default without a model
        del content["application/json"]
    has_body = "requestBody" in operation
    computes = path in _COMPUTING
    if not is_open:
        operation["security"] = [{name: []} for name in _SCHEMES] + [{}]
    max_chars = {"path": _MAX_NAME, "query": limits.max_event_id_chars}
    for parameter in parameters:
        for schema in parameter["schema"].get("anyOf", [parameter["schema"]]):
            if schema.get("type") == "string" and parameter["in"] in max_chars:
                schema.setdefault("maxLength", max_chars[parameter["in"]])
    if computes:
        call_headers = _call_headers(limits, streams=EVENTS in content)
        operation["parameters"] = [*parameters, *call_headers]
    refused = answers.pop("4XX")
    statuses = _statuses(path, is_open=is_open, has_body=has_body, computes=computes)
    for status in sorted(statuses):
        meaning, *headers = ERRORS[status]
        described = {name: _HEADERS[name] for name in headers}
        answers[str(status)] = refused | {"description": meaning, "headers": described}
    for status, answer in answers.items():
        answer.setdefault("headers", {})["x-request-id"] = _REQUEST_ID
        if computes and status in {"200", "429"}:
            answer["headers"] |= _RATE_LIMITS


def _statuses(path: str, *, is_open: bool, has_body: bool, computes: bool) -> set[int]:
    """The errors that an endpoint may answer with."""
    found = {403, 414, 431, 500} if is_open else {401, 403, 414, 431, 500}
    if not is_open and is_counted(path):
        found |= {429, 503}
    if has_body:
        found |= {400, 404, 408, 413, 415}
    if computes:
        found |= {409, 410, 504}
    if "{" in path:
        found |= {404}
    if path.startswith(("/v1/streams/", "/v1/responses/")):
        found |= {400, 409, 410}
    if path.startswith(("/v1/encodings/", "/v1/decisions/")):
        found |= {410}
    if path == "/v1/usage":
        found |= {400}
    if path.startswith(("/v1/files", "/v1/batches")):
        found |= {400, 404, 409, 503}
    if path.startswith("/health"):
        found |= {503}
    return found


def _bound_fields(schema: Json, *, limits: ApiLimits, card: ModelCard) -> None:
    """Gives each field of a body the limits that its type does not have."""
    properties = schema["properties"]
    maxima = _maxima(limits, card)
    sizes = {
        "stop": (limits.max_stop_strings, limits.max_stop_chars),
        "stop_sequences": (limits.max_stop_strings, limits.max_stop_chars),
        "stop_token_ids": (limits.max_stop_token_ids, None),
        "bad_words": (limits.max_bad_words, limits.max_bad_word_chars),
        "allowed_token_ids": (limits.max_allowed_token_ids, None),
    }
    for name, field in properties.items():
        if name == "chat_template_kwargs" and "prompt" not in properties:  # else it has no effect
            field["anyOf"][0] = _template_kwargs(limits)
        if name == "prompt" and len(field["anyOf"]) == 4:
            for lists in (field["anyOf"][1], field["anyOf"][3]):
                lists["maxItems"] = limits.max_prompts
        if name == "seed":  # FastAPI writes limits as floats, which are not exact here
            field["anyOf"][0] |= {"minimum": -(2**63), "maximum": 2**64 - 1}
        items, chars = sizes.get(name, (limits.max_body_bytes // 2, limits.max_body_bytes))
        for node in _nodes(field):
            kind = node.get("type")
            if kind == "integer" and not node.keys() & {"maximum", "exclusiveMaximum"}:
                node["maximum"] = maxima.get(name, MAX_INT)
            elif kind == "array":
                node["maxItems"] = min(node.get("maxItems", items), items)
            elif kind == "string" and not node.keys() & {"enum", "const", "pattern", "maxLength"}:
                node["maxLength"] = chars
            elif kind == "object" and node.get("additionalProperties") is True:
                node["maxProperties"] = limits.max_body_bytes // 5


def _maxima(limits: ApiLimits, card: ModelCard) -> dict[str, int]:
    """The maximum of each integer that is limited by the settings or the model."""
    lengths = ("min_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens")
    ids = ("prompt", "tokens", "stop_token_ids", "allowed_token_ids")
    return {
        **dict.fromkeys(ids, card.vocab_size - 1),
        **dict.fromkeys(lengths, card.max_model_len),
        "positions": card.max_model_len - 1,
        "n": limits.max_choices,
        "best_of": limits.max_choices,
        "logprobs": limits.max_logprobs,
        "top_logprobs": limits.max_top_logprobs,
        "prompt_logprobs": limits.max_top_logprobs,
    }


def _template_kwargs(limits: ApiLimits) -> Json:
    option = {"type": "boolean", "description": "Passed to the model's chat template."}
    return {
        "type": "object",
        "properties": dict.fromkeys(sorted(limits.template_kwargs), option),
        "additionalProperties": False,
    }


def _nodes(value: object) -> Iterator[Json]:
    """Yields all objects within a JSON value; it does not follow references."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _nodes(item)


def _header(description: str, **schema: Any) -> Json:  # noqa: ANN401  # words of JSON Schema
    return {"description": description, "schema": {"type": "string", **schema}}


def _call_headers(limits: ApiLimits, *, streams: bool) -> list[Json]:
    """The request headers of a call that computes something with a model."""
    timeout = {"type": "integer", "minimum": 1, "maximum": limits.max_timeout_ms}
    key = {"pattern": "^[!-~]+$", "minLength": 1, "maxLength": limits.max_key_chars}
    headers = {
        "x-request-timeout-ms": _header(
            "Milliseconds that the answer may take; then 504, or a partial answer.",
            **timeout,
            examples=[60_000],
        ),
        "idempotency-key": _header(
            "Calls with equal keys and bodies get the same answer.", **key, examples=["order-4711"]
        ),
    }
    if streams:
        headers["x-quire-event-ids"] = _header(
            "1: events have ids, and the stream can be resumed after any of them.", enum=["0", "1"]
        )
    return [{"name": name, "in": "header", **header} for name, header in headers.items()]


_SCHEMES: Json = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "As OpenAI's clients send it."},
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "As Anthropic's clients send it.",
    },
}
_REQUEST_ID = _header("The id of the call: it appears in logs, and resumes or cancels the call.")
_RATE_LIMITS = {
    f"x-ratelimit-{word}-{unit}": _header(f"{text} Only if the key has a limit on {unit}.")
    for unit in ("requests", "tokens")
    for word, text in (
        ("limit", "The limit per minute."),
        ("remaining", "How much of the limit is left."),
        ("reset", "Time until all of it is available again, such as 820ms or 2m4.5s."),
    )
}
_HEADERS: Mapping[str, Json] = MappingProxyType({
    "retry-after": _header("Seconds until a retry.", type="integer", minimum=1, maximum=60),
    "retry-after-ms": _header(
        "The same in milliseconds.", type="integer", minimum=1000, maximum=60_000
    ),
    "connection": _header("The server closes the connection.", enum=["close"]),
    "x-should-retry": _header("The same request cannot succeed.", enum=["false"]),
    "www-authenticate": _header("How to send a key.", enum=["Bearer"]),
})  # fmt: skip
ERRORS: Mapping[int, tuple[str, ...]] = MappingProxyType({
    400: ("The request is invalid; `param` names the field.",),
    401: ("The request has no valid API key.", "www-authenticate"),
    403: ("The key does not permit this.",),
    404: ("Unknown model, stream, response or file.", "x-should-retry"),
    408: ("The body did not arrive in time.", "connection"),
    409: ("The idempotency key has another body, or the journal differs.", "x-should-retry"),
    410: ("The answer is no longer stored.", "x-should-retry"),
    413: ("The body is too large.", "connection"),
    414: ("The URL is too long.", "connection"),
    415: ("The body is not plain JSON.",),
    429: ("A limit of the key or the tenant is exceeded.", "retry-after", "retry-after-ms"),
    431: ("The headers are too large.", "connection"),
    500: ("The server or the engine failed.", "x-should-retry"),
    503: ("Queue full or unreachable, no engine, or shutdown.", "retry-after", "retry-after-ms"),
    504: ("The timeout expired before the first token.",),
})  # fmt: skip
"""Status -> its meaning, and the headers that it may have."""
_CHAT = [{"role": "user", "content": "Name three colours."}]
_EXAMPLES: Mapping[str, Json] = MappingProxyType({
    "CompletionBody": {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
    "ChatBody": {"messages": _CHAT, "max_tokens": 40, "temperature": 0},
    "ResponseBody": {"input": "Name three colours.", "max_output_tokens": 40, "temperature": 0},
    "MessageBody": {"messages": _CHAT, "max_tokens": 40, "temperature": 0},
    "CountBody": {"messages": _CHAT},
    "TokenizeBody": {"prompt": "Hello, world"},
    "DetokenizeBody": {"tokens": [1, 2, 3]},
    "BatchBody": {
        "input_file_id": "file-019a", "endpoint": "/v1/completions", "completion_window": "24h",
    },
    "AttentionBody": {"prompt": "Hello, world", "layer": 0, "head": 0},
    "EmbeddingsBody": {"input": ["Hello", "world"]},
    "RerankBody": {"query": "What purrs?", "documents": ["A cat.", "A car."]},
    "ScoreBody": {"text_1": "What purrs?", "text_2": ["A cat.", "A car."]},
    "ClassifyBody": {"input": "I like it."},
    "DecisionBody": {
        "input": "I was charged twice.",
        "questions": [
            {"type": "predicate", "instructions": "The customer wants a refund."},
            {"type": "choice", "instructions": "The topic?", "choices": [
                {"value": "billing"}, {"value": "delivery"}]},
            {"type": "score", "instructions": "The mood?", "levels": [
                {"label": "calm"}, {"label": "angry"}]},
        ],
    },
})  # fmt: skip
