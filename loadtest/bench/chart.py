"""The chart of a comparison, by Matplotlib: a panel per load, a bar per server, the roof."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.document import Document
from loadtest.bench.measure import Kind
from loadtest.bench.overview import CPU, SPEED, is_busy, label, views_of
from loadtest.bench.views import View, decode_view, goodput, median

_QUIRE, _PEER = "#0f766e", "#94a3b8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Values by server, NaN if all requests failed; servers that were not measured are left out."""

    title: str
    values: Mapping[str, float]
    roof: float = math.nan


def panels_of(document: Document) -> list[Panel]:
    """Each load, time to first token, goodput; CPU time instead if the machine was busy."""
    measure = CPU if is_busy(document) else SPEED
    panels = [
        Panel(
            title=f"{load}: {measure.title}",
            values={name: view.median(name, measure.figure) for name in view.servers},
            roof=_roof(view) if measure is SPEED else math.nan,
        )
        for load, view in views_of(document).items()
    ]
    if measure is CPU:
        return panels
    sizes = document.sizes
    clients = 8 if 8 in sizes.clients else max(sizes.clients)
    burst = decode_view(document, clients)
    first = {
        name: 1e3 * burst.median(name, lambda row: row.summary.time_to_first_p50)
        for name in burst.servers
    }
    panels.append(Panel(title=f"{clients} clients, time to first token in ms", values=first))
    if any(row.kind is Kind.ARRIVALS for row in document.results):
        known = {name: goodput(document, name) for name in document.servers}
        known = {name: value for name, value in known.items() if not math.isnan(value)}
        panels.append(Panel(title="Poisson arrivals, good requests/s", values=known))
    return [panel for panel in panels if panel.values]


def _roof(view: View) -> float:
    """Of the first server; chats have none, because their number of rows varies."""
    roofs = view.roofs_of(view.document.base)
    return math.nan if view.kind is Kind.CHAT else median(roofs)


def draw(document: Document, path: Path) -> None:
    """Writes the chart as SVG; the same document gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "quire", "font.size": 9}
    panels = panels_of(document)
    rows = math.ceil(len(panels) / 2)
    height = 0.24 * len(document.servers) + 0.7
    figure = Figure(figsize=(11, rows * height + 0.6), layout="constrained", facecolor="white")
    where = f"{document.date} · {document.kind}, {document.machine.cpus} CPUs"
    figure.suptitle(f"Quire and its peers, {document.model}\n{where}")
    for axes, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        lengths = [0 if math.isnan(value) else value for value in panel.values.values()]
        colours = [_QUIRE if name.startswith("quire") else _PEER for name in panel.values]
        bars = axes.barh([label(name) for name in panel.values], lengths, color=colours)
        axes.bar_label(bars, [_label(value) for value in panel.values.values()], padding=3)
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        if not math.isnan(panel.roof):
            axes.axvline(panel.roof, color="black", linestyle="--", label="roof")
            axes.legend(loc="lower right", frameon=False)
    for empty in figure.axes[len(panels) :]:
        empty.remove()
    figure.savefig(path, format="svg", metadata={"Date": None})


def _label(value: float) -> str:
    if math.isnan(value):
        return "failed"
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
