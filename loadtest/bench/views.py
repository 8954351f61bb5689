"""Results of one load by server: medians over the repeats, ratios within a repeat, the roof."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loadtest.bench.document import Document
from loadtest.bench.measure import Kind, Result


@dataclass(frozen=True, slots=True)
class View:
    """Results of one kind of load at one level, by server."""

    document: Document
    kind: Kind
    level: float

    @property
    def servers(self) -> list[str]:
        return [name for name in self.document.servers if self.of(name)]

    def of(self, server: str) -> list[Result]:
        """Results of a server, one per repeat."""
        return [
            result
            for result in self.document.results
            if (result.server, result.kind, result.level) == (server, self.kind, self.level)
        ]

    def median(self, server: str, figure: Callable[[Result], float]) -> float:
        """Over the repeats that have the figure; NaN if none has."""
        return median([figure(result) for result in self.of(server)])

    def ratio(self, base: str, server: str) -> float:
        """Median of base speed / server speed over the repeats in which both succeeded."""
        return median(ratios(self.of(base), self.of(server)))

    def of_roof(self, server: str) -> float:
        """Median of server speed / roof of the same repeat, with the size of its weights."""
        roofs = self.roofs_of(server)
        results = [result for result in self.of(server) if 0 <= result.repeat < len(roofs)]
        return median([result.speed / roofs[result.repeat] for result in results])

    def roofs_of(self, server: str) -> list[float]:
        """Tokens per second, one per repeat; a server of unknown weights reads one byte each."""
        size = self.document.weight_bytes.get(server, 1.0)
        weights, level = replace(self.document.weights, layer_bytes=size), int(self.level)
        if self.kind is Kind.PREFILL:
            return [roof.prefill(weights, tokens=level) for roof in self.document.roofs]
        return [roof.decode(weights, rows=level) for roof in self.document.roofs]


def median(values: Sequence[float]) -> float:
    """Ignores NaN; NaN if nothing is left."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def ratios(base: Sequence[Result], other: Sequence[Result]) -> list[float]:
    """Speed of `base` / speed of `other` for each repeat in which both succeeded."""
    speeds = {result.repeat: result.speed for result in other}
    pairs = [(result.speed, speeds[result.repeat]) for result in base if result.repeat in speeds]
    return [mine / theirs for mine, theirs in pairs if mine > 0 and theirs > 0]


def goodput(document: Document, server: str) -> float:
    """Maximum of good requests per second over all rates; NaN if not measured."""
    good = [
        row.level * row.good / row.summary.requests
        for row in document.results
        if row.server == server and row.kind is Kind.ARRIVALS
    ]
    return max(good, default=math.nan)


def decode_view(document: Document, clients: int) -> View:
    return View(document, Kind.DECODE, clients)


def prefill_view(document: Document) -> View:
    return View(document, Kind.PREFILL, document.sizes.prefill_tokens)


def chat_view(document: Document, clients: int) -> View:
    return View(document, Kind.CHAT, clients)
