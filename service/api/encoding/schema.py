"""Bodies and answers of the endpoints that encode, in the shapes of OpenAI, Cohere and vLLM."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from service.api.http.fields import (
    FieldError,
    Ignored,
    Priority,
    RequiredModel,
    Text,
    check_prompt,
    checked_text,
    short_list,
)
from service.api.http.models import (
    AnswerModel,
    CallId,
    Count,
    Created,
    ModelId,
    NumericClass,
    StoredResult,
    WireModel,
)

MAX_INPUTS = 2048
"""Of one call, as OpenAI limits them."""

_ANY_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_ANY_INPUTS = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _TEXTS | {"maxItems": MAX_INPUTS},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_INPUTS},
    ]
}
_DOCUMENT = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}


def _documents(value: object) -> list[str]:
    """Texts, or objects with a text."""
    if not isinstance(value, list) or not value:
        raise FieldError("invalid_type", "must be a list of at least one text")
    return [_document(each) for each in short_list(value, most=MAX_INPUTS)]


def _document(value: object) -> str:
    text = value["text"] if isinstance(value, dict) and set(value) == {"text"} else value
    if not isinstance(text, str):
        raise FieldError("invalid_type", 'must be texts, or objects with "text" and no other key')
    return checked_text(text)


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return _documents([value])
    if not isinstance(value, list) or not value:
        raise FieldError("invalid_type", "must be a text, or a list of at least one")
    return _documents(value)


Inputs = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(partial(check_prompt, most=MAX_INPUTS)),
    WithJsonSchema(_ANY_INPUTS),
]
Documents = Annotated[
    list[str],
    PlainValidator(_documents),
    WithJsonSchema({
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, _DOCUMENT]},
        "minItems": 1,
        "maxItems": MAX_INPUTS,
    }),
]  # fmt: skip
Texts = Annotated[
    list[str],
    PlainValidator(_texts),
    WithJsonSchema({
        "anyOf": [_ANY_TEXT, _TEXTS | {"items": _ANY_TEXT, "maxItems": MAX_INPUTS}],
    }),
]  # fmt: skip


class EncodingBody(WireModel):
    """What all of these endpoints share."""

    model: RequiredModel
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        description="Cut the end of an input that has more tokens, special ones included; -1: more "
        "than the model reads. Default: such an input is refused.",
    )
    priority: Priority = None
    background: bool | None = Field(
        None,
        description="Answer at once with an id, by which GET /v1/encodings returns the result.",
    )
    user: Ignored = None


class EmbeddingsBody(EncodingBody):
    """The body of POST /v1/embeddings."""

    input: Inputs = Field(
        description="A text, up to 2,048 of them, token ids, or lists of token ids."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float, or base64 of little-endian float32 values. Default float."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Keep so many values, scaled to length 1. Default: all."
    )
    prompt_name: str | None = Field(
        None,
        description="One of the model's own prompts, such as query, to put before each text. "
        "Default: the model's default, if it has one.",
    )


class RerankBody(EncodingBody):
    """The body of POST /v1/rerank and /v2/rerank."""

    query: Text = Field(description="What the documents are compared with.")
    documents: Documents = Field(description="Up to 2,048 texts, or objects with a text.")
    top_n: int | None = Field(
        None, ge=0, description="Return the best documents only; 0 or null: all, best first."
    )
    return_documents: bool | None = Field(
        None, description="Repeat the text of each document in the answer. Default false."
    )
    max_tokens_per_doc: int | None = Field(
        None, ge=1, description="As truncate_prompt_tokens, of the query and a document together."
    )


class ScoreBody(EncodingBody):
    """The body of POST /v1/score."""

    text_1: Texts = Field(description="A text, or one for each of text_2.")
    text_2: Texts = Field(description="A text, or several, to score with text_1.")


class ClassifyBody(EncodingBody):
    """The body of POST /v1/classify."""

    input: Inputs = Field(
        description="A text, up to 2,048 of them, token ids, or lists of token ids."
    )
    use_activation: bool | None = Field(
        None, description="Probabilities; false: logits. Default true."
    )


class EncodingUsage(AnswerModel):
    """Tokens of the inputs."""

    prompt_tokens: Count = Field(description="Tokens of all inputs, special ones included.")
    total_tokens: Count = Field(description="The same: nothing is generated.")


class Answer(AnswerModel):
    """What all answers share."""

    id: CallId
    model: ModelId
    usage: EncodingUsage = Field(description="Tokens of the call.")
    system_fingerprint: NumericClass


class Listed(Answer):
    """Results, one per input."""

    object: Literal["list"] = Field(description="The type of this object.")
    created: Created


class Embeddings(Listed):
    """Embeddings."""

    data: list[dict[str, Any]] = Field(description="An embedding per input, in their order.")


class Reranked(Answer):
    """Documents by relevance."""

    results: list[dict[str, Any]] = Field(
        description="The index and relevance_score of each document, the best first."
    )
    method: Literal["cross-encoder", "cosine"] = Field(description="What a score is.")
    meta: dict[str, Any] = Field(description="The version of the API, as Cohere returns it.")


class Scores(Listed):
    """Scores."""

    data: list[dict[str, Any]] = Field(description="A score per pair.")
    method: Literal["cross-encoder", "cosine"] = Field(description="What a score is.")


class Classes(Listed):
    """Classes."""

    data: list[dict[str, Any]] = Field(
        description="Per input its most likely label, the probabilities of all, and their number."
    )


class StoredEncoding(StoredResult):
    """A call by its id."""

    object: Literal["encoding"] = Field(description="The type of this object.")
