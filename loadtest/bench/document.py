"""The results of a comparison and their conditions, as one JSON file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import orjson
from pydantic import TypeAdapter

from loadtest.bench.measure import Result, Sizes
from model.native.roof import Roof, Weights
from service.doctor.machine import Machine


@dataclass(slots=True, kw_only=True)
class Document:
    """A comparison. The first server is the base of all ratios."""

    date: str
    machine: Machine
    model: str
    weights: Weights
    sizes: Sizes
    servers: list[str]
    threads: dict[str, int] = field(default_factory=dict)  # of servers whose threads were tuned
    roofs: list[Roof] = field(default_factory=list)  # one per repeat, or none
    results: list[Result] = field(default_factory=list)
    perplexity: dict[str, float] = field(default_factory=dict)  # by server, where it is known
    weight_bytes: dict[str, float] = field(default_factory=dict)  # of a weight of the layers
    variant: str = ""  # instruction set that all servers are restricted to; empty: the best one
    command: str = ""  # that measured this
    left_out: dict[str, str] = field(default_factory=dict)  # wholly or partly; the reason

    @property
    def base(self) -> str:
        return self.servers[0]

    @property
    def kind(self) -> str:
        """Of the CPU. One that is restricted stands in for others, and is named as such."""
        restricted = f" restricted to {self.variant.upper()}" if self.variant else ""
        return self.machine.kind + restricted


def write(document: Document, path: Path) -> None:
    """NaN becomes null."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE
    path.write_bytes(orjson.dumps(document, option=options))


def read(path: Path) -> Document:
    """Raises ValueError for anything but the file of a comparison."""
    return TypeAdapter(Document).validate_json(path.read_bytes())
