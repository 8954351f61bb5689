r"""Arguments as elements: <parameter=NAME>\nVALUE\n</parameter>\n, one per argument.

The value of a string is its text, that of any other type is JSON. If a parameter may be both, the
value decides: it is JSON if it is JSON of an allowed type, else text (`parameter_types`, which the
parser of the answer uses, too).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Any

from service.api.structured.json_schema import (
    Schema,
    without_annotations,
    without_property_counts,
)
from service.api.tools.arguments import JSON_TYPES, PARAMETER, PARAMETER_END, VALUE, json_of
from service.api.tools.chat import FunctionDefinition

_MAX_REFS = 8  # that lead to one schema
_MAX_OTHERS = 32  # arguments that the schema does not name
# Keywords of a parameter that are enforced if it is a string; of one that may be a string and
# something else, only its types are.
_TEXT_KEYWORDS = frozenset({"type", "minLength", "maxLength", "enum", "const"})
_OBJECT_KEYWORDS = frozenset({"type", "properties", "required", "additionalProperties", "$schema"})
_DEFINITIONS = ("$defs", "definitions")
_END = PARAMETER_END.replace("\n", r"\n").replace("/", r"\/")


def parameter_types(schema: Schema) -> dict[str, tuple[str, ...]]:
    """Parameter -> the JSON types of its value; none: any."""
    properties = schema.get("properties") or {}
    return {name: tuple(sorted(_types(value, schema))) for name, value in properties.items()}


def first_inexpressible(schema: Schema) -> tuple[str, str] | None:
    """The path of a keyword that elements cannot enforce exactly, and the reason; None: all can."""
    for key in without_annotations(schema).keys() - _OBJECT_KEYWORDS - {*_DEFINITIONS}:
        return key, "is not supported by this model's tool-call format"
    for name, value in (schema.get("properties") or {}).items():
        if "\n" in name:
            return f"properties.{name}", "must not contain line breaks"
        types = _types(value, schema)
        if (types and "string" not in types) or value in (True, {}):
            continue  # enforced as JSON, or nothing to enforce
        kinds = [_Kind.of(each) for each in _alternatives(value, schema)]
        only_typed = isinstance(value, dict) and without_annotations(value).keys() == {"type"}
        if not only_typed and (_Kind.OTHER in kinds or kinds.count(_Kind.TEXT) > 1):
            return f"properties.{name}", "cannot be a text and something else"
        for each in _alternatives(value, schema):
            for key in without_annotations(each).keys() - _TEXT_KEYWORDS:
                return f"properties.{name}.{key}", "is not supported for text"
    return None


class _Kind(Enum):
    """What a schema without alternatives allows."""

    VALUES = "values"  # a few
    TEXT = "text"
    OTHER = "other"

    @classmethod
    def of(cls, schema: Mapping[str, Any]) -> _Kind:
        if _values(schema) is not None:
            return cls.VALUES
        return cls.TEXT if schema.get("type") == "string" else cls.OTHER


def _alternatives(value: Any, root: Schema, *, refs: int = _MAX_REFS) -> list[dict[str, Any]]:  # noqa: ANN401
    """The schemas of which a value matches at least one."""
    if not isinstance(value, dict) or not refs:
        return [{}]
    branches = value.get("anyOf", value.get("oneOf"))
    if isinstance(ref := value.get("$ref"), str):
        branches = [_referred(ref, root)]
    if isinstance(branches, list):
        return [each for part in branches for each in _alternatives(part, root, refs=refs - 1)]
    if isinstance(kinds := value.get("type"), list) and "enum" not in value:
        return [value | {"type": kind} for kind in kinds]
    return [value]


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """All values that a schema allows; None: more than a few."""
    if "const" in schema:
        return [schema["const"]]
    if isinstance(values := schema.get("enum"), list):
        return values
    few: dict[str, list[Any]] = {"null": [None], "boolean": [True, False]}
    return few.get(str(schema.get("type")))


def tagged_rules(index: int, function: FunctionDefinition) -> list[str]:
    """Rules in Lark; `arguments_{index}` derives the elements of all arguments."""
    schema = without_annotations(function.parameters or {"additionalProperties": False})
    properties = schema.get("properties") or {}
    required = set(schema.get("required") or ())
    names = [*properties, *sorted(required - properties.keys())]
    elements, rules = [], []
    for number, name in enumerate(names):
        if "\n" in name:
            continue
        label = f"{index}_{number}"
        elements.append(f"parameter_{label}" + ("" if name in required else "?"))
        head = json.dumps(f"{PARAMETER}{name}{VALUE}", ensure_ascii=False)
        rules.append(f"parameter_{label}: {head} value_{label}")
        value = properties.get(name, True)
        rules += _value_rules(label, value, root=schema, strict=function.strict)
    if not properties and schema.get("additionalProperties") is not False:
        elements.append(f"other_{index}{{0,{_MAX_OTHERS}}}")
        rules += [
            f'other_{index}: "{PARAMETER}" /[^>\\n]{{1,64}}/ {json.dumps(VALUE)} value_{index}',
            *text_rules(f"value_{index}"),
        ]
    return [f"arguments_{index}: {' '.join(elements) or _EMPTY}", *rules]


_EMPTY = '""'


def text_rules(name: str, pattern: str = r"(.|\n)*") -> list[str]:
    """Rules in Lark; `name` derives a text that matches, up to the end of its element."""
    terminal = name.upper()
    matched = rf"/({pattern}){_END}/ & ~/(.|\n)*{_END}(.|\n)+/"
    return [f"{name}[lazy]: {terminal}", f"{terminal}: {matched}"]


def _value_rules(label: str, value: Any, *, root: Schema, strict: bool) -> Iterator[str]:  # noqa: ANN401
    name, types = f"value_{label}", _types(value, root)
    value = value if isinstance(value, dict) else {}
    if types and "string" not in types:
        definitions = {key: root[key] for key in _DEFINITIONS if key in root}
        yield f"{name}: json_{label} {json.dumps(PARAMETER_END)}"
        yield f"json_{label}: %json {_json_schema(definitions | value, strict=strict)}"
        return
    given = _alternatives(value, root)
    kinds = [_Kind.of(each) for each in given]
    if _Kind.OTHER in kinds or kinds.count(_Kind.TEXT) > 1:
        yield from text_rules(name)
        return
    values = [item for each in given for item in _values(each) or ()]
    texts = [_text(item) for item in values if _is_read_back(item, types)]
    literals = [json.dumps(text + PARAMETER_END, ensure_ascii=False) for text in texts]
    for each, kind in zip(given, kinds, strict=True):
        if kind is _Kind.TEXT:
            literals.append(f"text_{label}")
            least, most = each.get("minLength", 0), each.get("maxLength", "")
            bounded = each.keys() & {"minLength", "maxLength"}
            pattern = rf"(.|\n){{{least},{most}}}" if bounded else r"(.|\n)*"
            yield from text_rules(f"text_{label}", pattern)
    yield f"{name}: {' | '.join(literals) or _EMPTY}"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_read_back(value: object, types: Collection[str]) -> bool:
    """Whether the parser reads the text of this value as this value."""
    text = _text(value)
    whole = PARAMETER_END not in text + PARAMETER_END[:-1]
    return whole and json.loads(json_of(text, sorted(types))) == value


def _json_schema(schema: Schema, *, strict: bool) -> str:
    """The operand of `%json`, in the spacing that models are trained on."""
    options: dict[str, Any] = dict(SPACING)
    if not strict:
        schema, options["lenient"] = without_property_counts(schema), True
    return json.dumps({**schema, "x-guidance": options}, separators=(",", ":"))


# Without optional blanks in which a small model may get lost.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _types(value: Any, root: Schema, *, refs: int = _MAX_REFS) -> set[str]:  # noqa: ANN401
    """The JSON types that a schema allows; empty: any."""
    if not isinstance(value, dict) or not refs:
        return set()
    if isinstance(given := value.get("type"), str | list):
        return {given} if isinstance(given, str) else {kind for kind in given if type(kind) is str}
    if "const" in value or isinstance(value.get("enum"), list):
        values = [value["const"]] if "const" in value else value["enum"]
        return {kind for item in values for kind in JSON_TYPES.get(type(item), ("string",))}
    branches = value.get("anyOf", value.get("oneOf", value.get("allOf")))
    if isinstance(ref := value.get("$ref"), str):
        branches = [_referred(ref, root)]
    found = [_types(branch, root, refs=refs - 1) for branch in branches or ()]
    if "allOf" in value:
        return next(filter(None, found), set())
    return set().union(*found) if all(found) else set()


def _referred(ref: str, root: Schema) -> object:
    match = re.fullmatch(r"#/(\$defs|definitions)/([^/~%]+)", ref)
    definitions = root.get(match[1]) if match else None
    return definitions.get(match[2]) if match and isinstance(definitions, dict) else None
