"""Field types of the wire: what a value must look like, with the error code for where it does not.

Only what can be said of one field by itself is here. What joins fields, or needs the model or the
configured limits, is in `admission`. Messages state limits; none repeats what the client sent.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, StringConstraints, WithJsonSchema

_TOKEN_KEY = re.compile(r"0|[1-9][0-9]{0,9}")
MAX_LOGIT_BIAS = 1024
MIN_TEMPERATURE = 1e-5  # below it a division by the temperature may overflow: taken as greedy


class FieldFault(ValueError):
    """What is wrong with a field; code and message reach the client as they are."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: it holds no lone surrogate."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise FieldFault("invalid_type", "must be a string")
    if not is_text(value):
        raise FieldFault("invalid_unicode", "must not hold a lone surrogate")
    return value


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise FieldFault("invalid_type", "must be a list of token ids, all of them integers")
    return value


def _prompt(value: object) -> str | list[str] | list[int] | list[list[int]]:
    """Tells the four shapes apart by the first item; an empty one anywhere is a fault."""
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif not isinstance(value, list):
        raise FieldFault("invalid_type", "must be a string, token ids, or a list of either")
    else:
        prompts = value
    if not prompts:
        raise FieldFault("empty_prompt", "must not be empty")
    if type(prompts[0]) is int:
        return _token_ids(prompts)
    kind = list if isinstance(prompts[0], list) else str
    for prompt in prompts:
        if not isinstance(prompt, kind):
            raise FieldFault("invalid_type", "must hold strings only, or lists of token ids only")
        if not prompt:
            raise FieldFault("empty_prompt", "must not be empty")
        if isinstance(prompt, str):
            _text(prompt)
        else:
            _token_ids(prompt)
    return value


def _stop(value: object) -> list[str] | None:
    if value is None:
        return None
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise FieldFault("invalid_type", "must be a string or a list of strings")
    if "" in strings:
        raise FieldFault("empty_string", "must not hold an empty string")
    return [_text(string) for string in strings]


def _logit_bias(value: object) -> tuple[tuple[int, float], ...] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FieldFault("invalid_type", "must be an object from token id to bias")
    if len(value) > MAX_LOGIT_BIAS:  # before the entries are looked at
        raise FieldFault("object_above_max_length", f"may have at most {MAX_LOGIT_BIAS} entries")
    pairs = []
    for key, bias in value.items():
        if not _TOKEN_KEY.fullmatch(key):
            raise FieldFault("invalid_token_id", "each key must be a token id in decimal digits")
        if type(bias) not in {int, float}:
            raise FieldFault("invalid_type", "each bias must be a number")
        if not -100 <= bias <= 100:  # NaN compares false, too
            raise FieldFault("invalid_number", "each bias must be between -100 and 100")
        pairs.append((int(key), float(bias)))
    return tuple(sorted(pairs))


def _no_tiny_temperature(value: float | None) -> float | None:
    return 0.0 if value is not None and 0 < value < MIN_TEMPERATURE else value


def _content(value: object) -> str:
    """The text of a message: a string, or text parts, which are joined."""
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list):
        raise FieldFault("invalid_type", "must be a string or a list of text parts")
    if not value:
        raise FieldFault("empty_array", "must hold at least one part")
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise FieldFault("invalid_type", 'each part must be an object with a string "type"')
        if part["type"] != "text":
            raise FieldFault("unsupported_content", "only parts of the type text are supported")
        if set(part) != {"type", "text"}:
            raise FieldFault("unknown_parameter", 'a text part has the keys "type" and "text"')
        texts.append(_text(part["text"]))
    return "".join(texts)


_TEXT_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": False,
    },
}
_IDS = {"type": "array", "items": {"type": "integer"}}
_STRINGS = {"type": "array", "items": {"type": "string"}}

Text = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})]
ModelName = Annotated[str, StringConstraints(min_length=1)]
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_prompt),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, _STRINGS, _IDS, {"type": "array", "items": _IDS}]}
    ),
]
Content = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXT_PARTS]}),
]
StopStrings = Annotated[
    list[str] | None,
    PlainValidator(_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS, {"type": "null"}]}),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...] | None,
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "additionalProperties": {"type": "number"}},
                {"type": "null"},
            ]
        }
    ),
]
TokenIds = Annotated[list[int], PlainValidator(_token_ids), WithJsonSchema(_IDS)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Temperature = Annotated[
    Annotated[Finite, Field(ge=0, le=2)] | None, AfterValidator(_no_tiny_temperature)
]
Penalty = Annotated[Finite, Field(ge=-2, le=2)] | None
TopP = Annotated[Finite, Field(gt=0, le=1)] | None
MinP = Annotated[Finite, Field(ge=0, le=1)] | None
RepetitionPenalty = Annotated[Finite, Field(ge=0.01, le=100)] | None
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None
