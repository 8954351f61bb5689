"""The shapes of answers, as the OpenAPI document has them. Fields may be added to any of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Json = dict[str, Any]

_COUNT = {"type": "integer", "minimum": 0}
_NULL = {"type": "null"}


def _text(description: str, **words: Any) -> Json:  # noqa: ANN401  # words of JSON Schema
    return {"type": "string", "description": description, **words}


def _is(value: object, description: str = "Which kind of object this is.") -> Json:
    return {"const": value, "description": description}


def _count(description: str) -> Json:
    return _COUNT | {"description": description}


def _list(items: Json, description: str) -> Json:
    return {"type": "array", "items": items, "description": description}


def _or_null(schema: Json, description: str) -> Json:
    return {"anyOf": [schema, _NULL], "description": description}


def _object(description: str, /, **properties: Json) -> Json:
    """All of these properties are always there."""
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": list(properties),
    }


_CALL_ID = _text("The call's id with the kind of answer before it.")
_CREATED = _count("When it began, in Unix seconds.")
_MODEL = _text("The id of the model.")
_CLASS = _text("The numeric class: within one the same request has the same answer, bit by bit.")
_USAGE = _object(
    "Token counts.",
    prompt_tokens=_count("Of the prompts, each once."),
    completion_tokens=_count("Of all choices that were generated."),
    total_tokens=_count("Their sum."),
    prompt_tokens_details=_object(
        "More of the prompt.", cached_tokens=_count("Found in the prefix cache.")
    ),
)
_FINISH = _text(
    "Why it ended: stop, length, tool_calls, cancelled, deadline.",
    examples=["stop", "length"],
)
_STOPPED_BY = _or_null({"type": "string"}, "The stop string or token id that ended it.") | {
    "anyOf": [{"type": "string"}, {"type": "integer"}, _NULL]
}
_NUMBERS = {"type": "array", "items": {"anyOf": [{"type": "number"}, _NULL]}}
_COMPLETION_LOGPROBS = _object(
    "Parallel lists, an item a token.",
    tokens=_list({"type": "string"}, "The tokens' texts."),
    token_logprobs=_NUMBERS | {"description": "Their log probabilities; null for the first."},
    top_logprobs=_list({"type": ["object", "null"]}, "Text to log probability of the likeliest."),
    text_offset=_list(_COUNT, "Where each begins in the text."),
)
_CHAT_LOGPROBS = _object(
    "An object for each token.", content=_list({"type": "object"}, "The tokens in order.")
)
_MESSAGE = _object(
    "What the assistant says.",
    role=_is("assistant", "Who speaks."),
    content=_or_null({"type": "string"}, "The text; null where there are calls alone."),
)
_MODEL_CARD = _object(
    "A model that is served here.",
    id=_MODEL,
    object=_is("model"),
    created=_count("When it was made known, in Unix seconds."),
    owned_by=_text("Who serves it."),
    max_model_len=_count("The most tokens of prompt and answer together."),
    numeric_class=_CLASS,
    system_fingerprint=_CLASS,
)
_TOKENS = _list(_COUNT, "The token ids.")

ANSWERS: Mapping[str, Json] = MappingProxyType({
    "Completion": _object(
        "A completion of each prompt.",
        id=_CALL_ID,
        object=_is("text_completion"),
        created=_CREATED,
        model=_MODEL,
        system_fingerprint=_CLASS,
        choices=_list(
            _object(
                "One choice.",
                index=_count("Choices of the first prompt come first."),
                text=_text("What was generated, after the prompt where echo asks for it."),
                logprobs=_or_null(_COMPLETION_LOGPROBS, "Where they were asked for."),
                finish_reason=_FINISH,
                stop_reason=_STOPPED_BY,
            ),
            "All choices.",
        ),
        usage=_USAGE,
    ),
    "ChatCompletion": _object(
        "An answer to a chat.",
        id=_CALL_ID,
        object=_is("chat.completion"),
        created=_CREATED,
        model=_MODEL,
        system_fingerprint=_CLASS,
        choices=_list(
            _object(
                "One choice.",
                index=_count("Its number, from 0."),
                message=_MESSAGE,
                logprobs=_or_null(_CHAT_LOGPROBS, "Where they were asked for."),
                finish_reason=_FINISH,
                stop_reason=_STOPPED_BY,
            ),
            "All choices.",
        ),
        usage=_USAGE,
    ),
    "Response": _object(
        "A response, as far as it has come.",
        id=_text("What it is retrieved by."),
        object=_is("response"),
        created_at={"type": "number", "description": "When it began, in Unix seconds."},
        status=_text("queued, in_progress, completed, incomplete, failed or cancelled."),
        model=_MODEL,
        output=_list({"type": "object"}, "Messages and calls of the assistant."),
    ),
    "AnthropicMessage": _object(
        "An answer in the shape of Anthropic's API.",
        id=_CALL_ID,
        type=_is("message"),
        role=_is("assistant", "Who speaks."),
        model=_MODEL,
        content=_list({"type": "object"}, "Blocks of text, and calls of tools."),
        stop_reason=_or_null({"type": "string"}, "Why it ended."),
        usage={"type": "object", "description": "Token counts."},
    ),
    "MessageCount": _object(
        "How long a prompt is.", input_tokens=_count("Tokens of the whole prompt.")
    ),
    "ModelList": _object(
        "All models.", object=_is("list"), data=_list(_MODEL_CARD, "One object a model.")
    ),
    "Model": _MODEL_CARD,
    "Version": _object("What serves.", version=_text("The server's version.")),
    "TokenList": _object(
        "A text as the model reads it.",
        count=_count("How many tokens."),
        max_model_len=_count("The most tokens of prompt and answer together."),
        tokens=_TOKENS,
        token_strs=_or_null({"type": "array", "items": {"type": "string"}}, "Their texts."),
    ),
    "TokenText": _object("Tokens as text.", prompt=_text("The text.")),
    "AttentionMap": _object(
        "Who looks at whom.",
        object=_is("attention"),
        model=_MODEL,
        tokens=_TOKENS,
        rows=_list({"type": "object"}, "A row of weights for each token asked for."),
    ),
    "StreamEvent": {
        "type": "object",
        "description": "One server-sent event; a comment in long silence is none.",
        "properties": {
            "data": _text("A chunk of the answer as JSON; at the end of some streams: [DONE]."),
            "event": _text("Its type, where the API has types of events."),
            "id": _text("What the stream can be resumed after, where that was asked for."),
        },
        "required": ["data"],
    },
    "StreamCancelled": _object(
        "A call that ends.", id=_CALL_ID, object=_is("stream"), cancelled=_is(value=True)
    ),
    "ResponseDeleted": _object(
        "A response that is gone.", id=_CALL_ID, object=_is("response"), deleted=_is(value=True)
    ),
    "Health": _object("It is well.", status=_is("ok", "Always ok: what is not ok is an error.")),
    "Status": _object(
        "What runs and what waits.",
        model=_MODEL,
        max_model_len=_count("The most tokens of prompt and answer together."),
        numeric_class=_CLASS,
        version=_text("The server's version."),
        draining={"type": "boolean", "description": "Whether it is on its way out."},
        queue=_or_null({"type": "object"}, "The queue's depth; null where it is away."),
        engines=_list({"type": "object"}, "What each engine said of itself lately."),
    ),
})  # fmt: skip
"""Name of a schema -> the schema."""

SHAPES: Mapping[tuple[str, str], str] = MappingProxyType({
    ("post", "/v1/completions"): "Completion",
    ("post", "/v1/chat/completions"): "ChatCompletion",
    ("post", "/v1/responses"): "Response",
    ("get", "/v1/responses/{response_id}"): "Response",
    ("post", "/v1/responses/{response_id}/cancel"): "Response",
    ("delete", "/v1/responses/{response_id}"): "ResponseDeleted",
    ("post", "/v1/messages"): "AnthropicMessage",
    ("post", "/v1/messages/count_tokens"): "MessageCount",
    ("delete", "/v1/streams/{call_id}"): "StreamCancelled",
    ("get", "/v1/models"): "ModelList",
    ("get", "/v1/models/{model}"): "Model",
    ("get", "/version"): "Version",
    ("post", "/tokenize"): "TokenList",
    ("post", "/detokenize"): "TokenText",
    ("post", "/v1/attention"): "AttentionMap",
    ("get", "/health"): "Health",
    ("get", "/health/live"): "Health",
    ("get", "/health/ready"): "Health",
    ("get", "/health/startup"): "Health",
    ("get", "/status"): "Status",
})  # fmt: skip
"""Method and path of an endpoint -> the schema of its JSON answer."""
