"""All that a comparison measured, and on what: one JSON file, written and read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from loadtest.bench.machine import Machine
from loadtest.bench.measure import Kind, Result, Sizes
from loadtest.bench.roof import Roof, Weights
from loadtest.client import Summary


@dataclass(slots=True, kw_only=True)
class Document:
    """A comparison. The first of the servers is the one that all are compared with."""

    date: str
    machine: Machine
    model: str
    weights: Weights
    sizes: Sizes
    servers: list[str]
    threads: dict[str, int] = field(default_factory=dict)  # where they were tried out
    roofs: list[Roof] = field(default_factory=list)  # one a repeat, or none at all
    results: list[Result] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # whole or in part, with the reason

    @property
    def base(self) -> str:
        """The server that all are compared with."""
        return self.servers[0]


def write(document: Document, path: Path) -> None:
    """NaN becomes null."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE
    path.write_bytes(orjson.dumps(document, option=options))


def read(path: Path) -> Document:
    """A document as it was written. Raises ValueError, KeyError or TypeError for another file."""
    fields = orjson.loads(path.read_bytes())
    return Document(
        **fields
        | {
            "machine": Machine(**fields["machine"]),
            "weights": Weights(**fields["weights"]),
            "sizes": Sizes(**_with_tuples(fields["sizes"])),
            "roofs": [_roof(roof) for roof in fields["roofs"]],
            "results": [_result(result) for result in fields["results"]],
        }
    )


def _roof(fields: Mapping[str, Any]) -> Roof:
    products = {int(rows): speed for rows, speed in fields["products_a_second"].items()}
    return Roof(**{**fields, "products_a_second": products})


def _result(fields: Mapping[str, Any]) -> Result:
    summary: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in fields["summary"].items()
    }
    kind = Kind(fields["kind"])
    return Result(**{**fields, "kind": kind, "summary": Summary(**_with_tuples(summary))})


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
