"""Random JSON schemas, of what people write: objects, arrays, strings with patterns, references."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = ("^[a-z]{2,5}$", "^(yes|no)$", "^[A-Z][0-9]+$", r"^\d{3}-\d{2}$", "[xyz]{3}")
FORMATS = ("date", "uuid", "ipv4")
NAMES = ("name", "age", "x", "é", "a b", "kind", "tags", "n1")


def random_schema(seed: int) -> dict[str, Any]:
    """The same for the same seed. Some are recursive, by way of `$defs`."""
    draw = random.Random(seed)
    schema = _schema(draw, depth=draw.randint(1, 3))
    if draw.random() < 0.3:
        node = {
            "type": "object",
            "properties": {
                "value": _leaf(draw),
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        schema = {
            "type": "object",
            "$defs": {"node": node, "leaf": _leaf(draw)},
            "properties": {"list": {"$ref": "#/$defs/node"}, "leaf": {"$ref": "#/$defs/leaf"}},
            "required": draw.sample(["list", "leaf"], draw.randint(1, 2)),
            "additionalProperties": False,
        }
    return schema


def _schema(draw: random.Random, *, depth: int) -> dict[str, Any]:
    if depth == 0:
        return _leaf(draw)
    kind = draw.choice(["object", "object", "array", "tuple", "any", "leaf"])
    if kind == "object":
        return _object(draw, depth=depth)
    if kind == "array":
        array = {"type": "array", "items": _schema(draw, depth=depth - 1)}
        return array | {"minItems": draw.randint(0, 2), "maxItems": draw.randint(2, 4)}
    if kind == "tuple":
        items = [_schema(draw, depth=depth - 1) for _ in range(draw.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if kind == "any":
        return {"anyOf": [_schema(draw, depth=depth - 1) for _ in range(draw.randint(1, 3))]}
    return _leaf(draw)


def _object(draw: random.Random, *, depth: int) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randint(0, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(draw, depth=depth - 1) for name in names},
        "required": draw.sample(names, draw.randint(0, len(names))),
        "additionalProperties": False,
    }
    if draw.random() < 0.2:
        schema["additionalProperties"] = _leaf(draw)
    return schema


def _leaf(draw: random.Random) -> dict[str, Any]:
    low = draw.randint(-50, 50)
    return draw.choice(
        [
            {"type": "string", "maxLength": draw.randint(0, 12)},
            {"type": "string", "minLength": 2, "maxLength": 6},
            {"type": "string", "pattern": draw.choice(PATTERNS)},
            {"type": "string", "format": draw.choice(FORMATS)},
            {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 1000)},
            {"type": "integer", "exclusiveMinimum": low, "maximum": low + 10},
            {"type": "number", "minimum": 0, "maximum": draw.choice([1, 0.5, 100])},
            {"type": ["boolean", "null"]},
            {"type": ["string", "null"], "maxLength": 5},
            {"enum": draw.sample([1, "one", None, True, [2], {"k": "v"}, 0.5], draw.randint(1, 3))},
            {"const": draw.choice(["fixed", 7, None, 'with "quotes" and é'])},
        ]
    )
