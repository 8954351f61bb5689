"""The body of POST /v1/decisions, and its answers.

The input is that of a response, without reasoning and references; parts of JSON become text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    field_validator,
)

from service.api.http.fields import (
    MAX_LABEL,
    FieldError,
    Ignored,
    Label,
    NoEffect,
    Priority,
    RequiredModel,
    ResponseContent,
    Text,
    check_json,
    checked_label,
    short_list,
)
from service.api.http.models import (
    MAX_MESSAGES,
    AnswerModel,
    CallId,
    Count,
    ModelId,
    NumericClass,
    StoredResult,
    StrictModel,
    WireModel,
)
from service.api.responses.items import (
    RESULTS,
    InputCall,
    InputCustomCall,
    InputMessage,
    InputResult,
)

MAX_QUESTIONS, MAX_OPTIONS = 400, 255
"""Of one call, and of one question, as OpenAI limits them."""
MAX_JSON_CHARS = 2**18
"""Of a part of JSON, as compact text."""


def _parts_as_text(value: object) -> object:
    """Parts of the type input_json as parts of text. Raises FieldError."""
    return [_as_text(part) for part in short_list(value)] if isinstance(value, list) else value


def _as_text(part: object) -> object:
    if not isinstance(part, dict) or part.get("type") != "input_json":
        return part
    data = part.get("data")
    objects = data if isinstance(data, list) else [data]
    if set(part) != {"type", "data"} or not all(isinstance(each, dict) for each in objects):
        raise FieldError(
            "invalid_type", 'an input_json part has "data", an object or a list of objects'
        )
    check_json(data)
    text = orjson.dumps(data).decode()
    if len(text) > MAX_JSON_CHARS:
        raise FieldError(
            "string_above_max_length", f"input_json may have at most {MAX_JSON_CHARS} characters"
        )
    return {"type": "input_text", "text": f"\n{text}\n"}


def _items(value: object) -> object:
    """A text is a message of the user; parts of JSON become text in all items."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise FieldError("invalid_type", "must be a string or a list of items")
    return [
        {key: _parts_as_text(part) for key, part in item.items()}
        if isinstance(item, dict)
        else item
        for item in short_list(value)
    ]


def _kind_of_item(item: object) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind in RESULTS:
        return "(result)"
    return f"({kind})" if kind in ("function_call", "custom_tool_call") else "(message)"


def _kind_of_question(question: object) -> str:
    kind = question.get("type") if isinstance(question, dict) else None
    return f"({kind})" if kind in ("choice", "score") else "(predicate)"


def _value(value: object) -> str | bool:
    if not isinstance(value, str | bool):
        raise FieldError("invalid_type", "must be a string or a boolean")
    return value if isinstance(value, bool) else _option(value)


def _predicate(value: object) -> object:
    """The type of a question that is of no other type."""
    if value != "predicate":
        raise FieldError("invalid_value", "must be predicate, choice or score")
    return value


def _option(value: object) -> str:
    if value == "":
        raise FieldError("empty_string", "must not be empty")
    return checked_label(value)


def _distinct(values: Sequence[str | bool]) -> None:
    if len({(type(value), value) for value in values}) < len(values):
        raise FieldError("invalid_value", "must not contain the same option twice")


_OPTION = {"type": "string", "minLength": 1, "maxLength": MAX_LABEL}
AnyItem = Annotated[
    Annotated[InputMessage, Tag("(message)")]
    | Annotated[InputCall, Tag("(function_call)")]
    | Annotated[InputResult, Tag("(result)")]
    | Annotated[InputCustomCall, Tag("(custom_tool_call)")],
    Discriminator(_kind_of_item),
]
Instructions = Annotated[
    Annotated[ResponseContent, BeforeValidator(_parts_as_text)],
    Field(description="What is asked: a text, or a list of parts of text or JSON."),
]
Name = Annotated[Label | None, Field(description="The answer repeats it. Default null.")]
Description = Annotated[Text | None, Field(description="What the option means, for the model.")]


class _Question(StrictModel):
    instructions: Instructions
    name: Name = None


class Predicate(_Question):
    """How likely a statement about the input is true."""

    type: Annotated[Literal["predicate"], BeforeValidator(_predicate)] = Field(
        description="The kind of question."
    )


class _Described(StrictModel):
    description: Description = None


class Option(_Described):
    """An option of a choice."""

    value: Annotated[
        str | bool,
        PlainValidator(_value),
        WithJsonSchema({"anyOf": [_OPTION, {"type": "boolean"}]}),
    ] = Field(description="A text or a boolean, which the model would answer.")


class Choice(_Question):
    """Which of several options fits the input."""

    type: Literal["choice"] = Field(description="The kind of question.")
    choices: list[Option] = Field(
        min_length=2, max_length=MAX_OPTIONS, description="From 2 to 255 distinct options."
    )

    @field_validator("choices")
    @classmethod
    def _are_distinct(cls, value: list[Option]) -> list[Option]:
        _distinct([option.value for option in value])
        return value


class Level(_Described):
    """A level of a score."""

    label: Annotated[str, PlainValidator(_option), WithJsonSchema(_OPTION)] = Field(
        description="A text, which the model would answer."
    )


class Score(_Question):
    """Where the input is between ordered levels."""

    type: Literal["score"] = Field(description="The kind of question.")
    levels: list[Level] = Field(
        min_length=2,
        max_length=MAX_OPTIONS,
        description="From 2 to 255 distinct levels, the lowest first: its value is 0.",
    )

    @field_validator("levels")
    @classmethod
    def _are_distinct(cls, value: list[Level]) -> list[Level]:
        _distinct([level.label for level in value])
        return value


AnyQuestion = Annotated[
    Annotated[Predicate, Tag("(predicate)")]
    | Annotated[Choice, Tag("(choice)")]
    | Annotated[Score, Tag("(score)")],
    Discriminator(_kind_of_question),
]
_Items = Annotated[list[AnyItem], Field(min_length=1, max_length=MAX_MESSAGES)]


class DecisionBody(WireModel):
    """The body of POST /v1/decisions."""

    model: RequiredModel
    input: Annotated[
        _Items,
        BeforeValidator(_items, json_schema_input_type=str | _Items),
        Field(description="A text, or a list of messages, calls and results of tools."),
    ]
    questions: list[AnyQuestion] = Field(
        min_length=1,
        max_length=MAX_QUESTIONS,
        description="Predicates, choices and scores, each about the input alone.",
    )
    background: bool | None = Field(
        None,
        description="Answer at once with an id, by which GET /v1/decisions returns the result.",
    )
    priority: Priority = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: NoEffect = None
    safety_identifier: Ignored = None
    user: Ignored = None


class InputDetails(AnswerModel):
    """Of the input tokens."""

    cached_tokens: Count = Field(description="Found in the prefix cache.")
    cache_write_tokens: Count = Field(description="Always 0: writing to the cache is free.")


class OutputDetails(AnswerModel):
    """Of the output tokens."""

    reasoning_tokens: Count = Field(description="Always 0: the model does not reason.")


class DecisionUsage(AnswerModel):
    """Tokens of the call."""

    input_tokens: Count = Field(description="Tokens of the prompts; each question has one.")
    input_tokens_details: InputDetails = Field(description="Those in the cache.")
    output_tokens: Count = Field(description="Tokens of options that were scored.")
    output_tokens_details: OutputDetails = Field(description="Those of reasoning: none.")
    total_tokens: Count = Field(description="Their sum.")


class Decision(AnswerModel):
    """Answers to questions."""

    id: CallId
    model: ModelId
    answers: list[dict[str, Any]] = Field(
        description="Per question, in order: `type`, `name`, and the probability of a predicate, "
        "or the probabilities of all options, the best one and its confidence, the score."
    )
    usage: DecisionUsage = Field(description="Tokens of the call.")
    system_fingerprint: NumericClass


class StoredDecision(StoredResult):
    """A decision by the id of its call. Its inputs are the tokens to score."""

    object: Literal["decision"] = Field(description="The type of this object.")
