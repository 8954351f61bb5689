"""Types of body fields: the values they accept, and the error code for all others.

Only checks of single fields are here. Those of several fields, or that need the model or the
configured limits, are in `generation`. Messages state the limit and never repeat the input.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
)

_TOKEN_KEY = re.compile(r"0|[1-9][0-9]{0,9}")
MAX_LOGIT_BIAS = 1024
MAX_ITEMS = 1024  # of a list that is validated item by item; token ids are not
MAX_METADATA = 16
MAX_DEPTH = 64  # of a JSON schema, or of the arguments of a call
MAX_LABEL = 512  # characters of a text that is no prompt and no grammar, as OpenAI limits them
MAX_TOKEN_IDS = 2**18
_CACHE_HINTS = frozenset({"cache_control", "prompt_cache_breakpoint"})  # of a part; no effect
MIN_TEMPERATURE = 1e-5  # dividing by less may overflow: it counts as 0, which is greedy


class FieldError(ValueError):
    """An invalid field. Code and message are returned to the client."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def is_text(value: str) -> bool:
    """Whether a string can be encoded as UTF-8: it has no lone surrogates."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_json(value: object) -> None:
    """Raises FieldError for values that JSON text cannot hold, and for those nested too deep."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for node in level:
            if isinstance(node, dict):
                inner += node.keys()
                inner += node.values()
            elif isinstance(node, list):
                inner += node
            elif isinstance(node, str) and not is_text(node):
                raise FieldError("invalid_unicode", "must not contain lone surrogates")
            elif isinstance(node, float) and not math.isfinite(node):
                raise FieldError("invalid_number", "must not contain NaN or Infinity")
        if not inner:
            return
        level = inner
    raise FieldError("invalid_json", f"may be nested at most {MAX_DEPTH} deep")


def checked_text(value: object) -> str:
    """A string that can be encoded as UTF-8. Raises FieldError."""
    if not isinstance(value, str):
        raise FieldError("invalid_type", "must be a string")
    if not is_text(value):
        raise FieldError("invalid_unicode", "must not contain lone surrogates")
    return value


def checked_label(value: object) -> str:
    text = checked_text(value)
    if len(text) > MAX_LABEL:
        raise FieldError("string_above_max_length", f"may have at most {MAX_LABEL} characters")
    return text


def short_list(value: list[Any], *, most: int = MAX_ITEMS) -> list[Any]:
    """Checks the length before any item: an error must not cost more than an answer."""
    if len(value) > most:
        raise FieldError("array_above_max_length", f"may have at most {most} items")
    return value


def _ids(value: object) -> list[int]:
    return _token_ids(value)


def _allowed_ids(value: object) -> list[int] | None:
    if value is None:
        return None
    ids = _token_ids(short_list(value) if type(value) is list else value)
    if not ids:
        raise FieldError("empty_array", "must contain at least one token id")
    return sorted(set(ids))


def _stop_ids(value: object) -> list[int] | None:
    return (
        None if value is None else _token_ids(short_list(value) if type(value) is list else value)
    )


def _token_ids(value: object, *, too_long: str = "array_above_max_length") -> list[int]:
    if isinstance(value, list) and len(value) > MAX_TOKEN_IDS:
        raise FieldError(too_long, f"may have at most {MAX_TOKEN_IDS} token ids")
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise FieldError("invalid_type", "must be a list of token ids, all of them integers")
    return value


def check_prompt(
    value: object, *, most: int = MAX_ITEMS
) -> str | list[str] | list[int] | list[list[int]]:
    """Distinguishes the four forms by the first item. Empty prompts are errors."""
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif not isinstance(value, list):
        raise FieldError("invalid_type", "must be a string, token ids, or a list of either")
    else:
        prompts = value
    if not prompts:
        raise FieldError("empty_prompt", "must not be empty")
    if type(prompts[0]) is int:
        return _token_ids(prompts, too_long="context_length_exceeded")
    kind = list if isinstance(prompts[0], list) else str
    for prompt in short_list(prompts, most=most):
        if not isinstance(prompt, kind):
            raise FieldError(
                "invalid_type", "must contain strings only, ids only, or lists of ids only"
            )
        if not prompt:
            raise FieldError("empty_prompt", "must not be empty")
        if isinstance(prompt, str):
            checked_text(prompt)
        else:
            _token_ids(prompt, too_long="context_length_exceeded")
    return value


def _stop(value: object) -> list[str] | None:
    if value is None:
        return None
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise FieldError("invalid_type", "must be a string or a list of strings")
    if "" in short_list(strings):
        raise FieldError("empty_string", "must not contain an empty string")
    return [checked_text(string) for string in strings]


def _logit_bias(value: object) -> tuple[tuple[int, float], ...] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FieldError("invalid_type", "must be an object from token id to bias")
    if len(value) > MAX_LOGIT_BIAS:  # before any entry is checked
        raise FieldError("object_above_max_length", f"may have at most {MAX_LOGIT_BIAS} entries")
    pairs = []
    for key, bias in value.items():
        if not _TOKEN_KEY.fullmatch(key):
            raise FieldError("invalid_token_id", "each key must be a token id in decimal digits")
        if type(bias) not in {int, float}:
            raise FieldError("invalid_type", "each bias must be a number")
        if not -100 <= bias <= 100:  # NaN compares false, too
            raise FieldError("invalid_number", "each bias must be between -100 and 100")
        pairs.append((int(key), float(bias)))
    return tuple(sorted(pairs))


def _output_limit(value: int) -> int:
    if value < 1:
        message = "must be at least 1; leave it out for the default, there is no -1"
        raise FieldError("integer_below_min_value", message)
    return value


def _no_tiny_temperature(value: float | None) -> float | None:
    return 0.0 if value is not None and 0 < value < MIN_TEMPERATURE else value


def _content(value: object) -> str:
    """The text of a chat message. OpenAI's Agents SDK copies fields of an answer into its part."""
    ignored = frozenset({"annotations", "role"})
    return _joined(value, kinds=frozenset({"text", "refusal"}), ignored=ignored)


def _response_content(value: object) -> str:
    """The text of a response's input, which may be the output of an earlier response."""
    kinds = frozenset({"input_text", "output_text", "text", "refusal"})
    return _joined(value, kinds=kinds, ignored=frozenset({"annotations", "logprobs"}))


def _joined(value: object, *, kinds: frozenset[str], ignored: frozenset[str]) -> str:
    """A string, or text parts, which are joined. Their `ignored` keys have no effect."""
    if isinstance(value, str):
        return checked_text(value)
    if not isinstance(value, list):
        raise FieldError("invalid_type", "must be a string or a list of text parts")
    if not value:
        raise FieldError("empty_array", "must contain at least one part")
    texts = []
    for part in short_list(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise FieldError("invalid_type", 'each part must be an object with a string "type"')
        if part["type"] not in kinds:
            names = ", ".join(sorted(kinds))
            raise FieldError("unsupported_content", f"only parts of the type {names} are supported")
        key = "refusal" if part["type"] == "refusal" else "text"
        given = set(part) - ignored - _CACHE_HINTS
        if key == "text" and part.get("refusal", "") is None:
            given.remove("refusal")
        if given != {"type", key}:
            raise FieldError("unknown_parameter", f'a {key} part has the keys "type" and "{key}"')
        for hint in _CACHE_HINTS & part.keys():
            if not isinstance(part[hint], dict | None):
                raise FieldError("invalid_type", f"{hint} must be an object")
        texts.append(checked_text(part[key]))
    return "".join(texts)


def _few(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_METADATA:  # before any of them is checked
        raise FieldError("object_above_max_length", f"may have at most {MAX_METADATA} entries")
    return value


def _text_parts(*kinds: str) -> dict[str, Any]:
    parts = {"anyOf": [_part("text", *kinds), _part("refusal", "refusal")]}
    return {"type": "array", "minItems": 1, "maxItems": MAX_ITEMS, "items": parts}


def _part(key: str, *kinds: str) -> dict[str, Any]:
    hints = {hint: {"type": ["object", "null"]} for hint in sorted(_CACHE_HINTS)}
    return {
        "type": "object",
        "properties": {"type": {"enum": list(kinds)}, key: {"type": "string"}, **hints},
        "required": ["type", key],
        "additionalProperties": False,
    }


_NULL = {"type": "null"}
_NOT_EMPTY = {"type": "string", "minLength": 1}
_TOKEN_ID = {"type": "integer", "minimum": 0}
_IDS = {"type": "array", "items": _TOKEN_ID, "maxItems": MAX_TOKEN_IDS}
_PROMPT_IDS = _IDS | {"minItems": 1}
_FEW_IDS = {"type": "array", "items": _TOKEN_ID, "maxItems": MAX_ITEMS}
_FEW = {"type": "array", "maxItems": MAX_ITEMS}
_BIASES = {
    "type": "object",
    "propertyNames": {"pattern": f"^({_TOKEN_KEY.pattern})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_LOGIT_BIAS,
}

Text = Annotated[str, PlainValidator(checked_text), WithJsonSchema({"type": "string"})]
Label = Annotated[
    str, PlainValidator(checked_label), WithJsonSchema({"type": "string", "maxLength": MAX_LABEL})
]
ModelName = Annotated[str, StringConstraints(min_length=1)]
RequiredModel = Annotated[
    ModelName, Field(description="A model or an alias that /v1/models lists.")
]
OptionalModel = Annotated[
    ModelName | None,
    Field(description="A model or an alias that /v1/models lists. Default: its first one."),
]
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _NOT_EMPTY,
                _FEW | {"items": _NOT_EMPTY, "minItems": 1},
                _PROMPT_IDS,
                _FEW | {"items": _PROMPT_IDS, "minItems": 1},
            ]
        }
    ),
]
Content = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, _text_parts("text")]}),
]
ResponseContent = Annotated[
    str,
    PlainValidator(_response_content),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, _text_parts("input_text", "output_text", "text")]}
    ),
]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ]
    | None,
    BeforeValidator(_few),
    Field(json_schema_extra={"maxProperties": MAX_METADATA}),
]
StopStrings = Annotated[
    list[str] | None,
    PlainValidator(_stop),
    WithJsonSchema({"anyOf": [_NOT_EMPTY, _FEW | {"items": _NOT_EMPTY}, _NULL]}),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...] | None,
    PlainValidator(_logit_bias),
    WithJsonSchema({"anyOf": [_BIASES, _NULL]}),
]
StopIds = Annotated[
    list[int] | None, PlainValidator(_stop_ids), WithJsonSchema({"anyOf": [_FEW_IDS, _NULL]})
]
AllowedIds = Annotated[
    list[int] | None,
    PlainValidator(_allowed_ids),
    WithJsonSchema({"anyOf": [_FEW_IDS | {"minItems": 1}, _NULL]}),
]
TokenIds = Annotated[list[int], PlainValidator(_ids), WithJsonSchema(_IDS)]
OutputLimit = Annotated[int, AfterValidator(_output_limit), Field(json_schema_extra={"minimum": 1})]
Finite = Annotated[float, Field(allow_inf_nan=False)]
_TEMPERATURE = Field(
    description="0 is greedy; 1 samples from the model's own distribution. Default 1."
)
Temperature = Annotated[
    Annotated[Finite, Field(ge=0, le=2)] | None,
    AfterValidator(_no_tiny_temperature),
    _TEMPERATURE,
]
UnitTemperature = Annotated[
    Annotated[Finite, Field(ge=0, le=1)] | None,
    AfterValidator(_no_tiny_temperature),
    _TEMPERATURE,
]
Penalty = Annotated[Finite, Field(ge=-2, le=2)] | None
TopP = Annotated[
    Annotated[Finite, Field(gt=0, le=1)] | None,
    Field(description="Sample from the most likely tokens that have this total probability."),
]
MinP = Annotated[Finite, Field(ge=0, le=1)] | None
RepetitionPenalty = Annotated[Finite, Field(ge=0.01, le=100)] | None
Seed = Annotated[
    Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None,
    Field(description="The same seed gives the same answer. Default: a random one."),
]
NO_EFFECT = "Accepted for compatibility; has no effect."
Ignored = Annotated[Label | None, Field(description=NO_EFFECT)]
IgnoredText = Annotated[Text | None, Field(description=NO_EFFECT)]
NoEffect = Annotated[dict[str, Any] | None, Field(description=NO_EFFECT)]
ServiceTier = Annotated[
    Literal["auto", "default", "flex", "scale", "priority", "fast"] | None,
    Field(
        description="flex: the lowest priority; priority or fast: the highest that the key allows. "
        "The answer repeats it. Default: auto, the default priority."
    ),
]
CacheControl = Annotated[
    dict[str, Any] | None,
    Field(description="Accepted for compatibility; prefixes are cached without it."),
]

Priority = Annotated[
    int | None, Field(ge=0, le=2, description="0 goes before 1 before 2. Default 1.")
]
OnDisconnect = Annotated[
    Literal["cancel", "continue"] | None,
    Field(
        description="What happens to the generation when the connection is lost. Default: cancel, "
        "at once, or after a grace period if X-Quire-Event-Ids makes the stream resumable."
    ),
]
