"""The chart of a comparison, by Matplotlib: a panel per load, a bar per server, the roof."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.document import Document
from loadtest.bench.measure import Kind
from loadtest.bench.views import chat_view, decode_view, goodput, median, prefill_view

_QUIRE, _PEER = "#0f766e", "#94a3b8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Values by server, NaN if all requests failed; servers that were not measured are left out."""

    title: str
    values: Mapping[str, float]
    roof: float = math.nan


def panels_of(document: Document) -> list[Panel]:
    """Decoding and chats at each number of clients, prefill, time to first token, goodput."""
    sizes = document.sizes
    views = {
        f"{n} client{'s' * (n > 1)}, output tok/s": decode_view(document, n) for n in sizes.clients
    }
    views |= {f"chat of {n}, output tok/s": chat_view(document, n) for n in sizes.chat_clients}
    views[f"prompt of {sizes.prefill_tokens} tokens, prompt tok/s"] = prefill_view(document)
    panels = [
        Panel(
            title=title,
            values={name: view.median(name, lambda row: row.speed) for name in view.servers},
            roof=math.nan if view.kind is Kind.CHAT else median(view.roofs_of(document.base)),
        )
        for title, view in views.items()
    ]
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


def draw(document: Document, path: Path) -> None:
    """Writes the chart as SVG; the same document gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "quire", "font.size": 9}
    panels = panels_of(document)
    rows = math.ceil(len(panels) / 2)
    height = 0.24 * len(document.servers) + 0.7
    figure = Figure(figsize=(11, rows * height + 0.6), layout="constrained", facecolor="white")
    figure.suptitle(f"Quire and its peers, {document.model}\n{document.date} · {document.machine}")
    for axes, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        lengths = [0 if math.isnan(value) else value for value in panel.values.values()]
        colours = [_QUIRE if name.startswith("quire") else _PEER for name in panel.values]
        bars = axes.barh(list(panel.values), lengths, color=colours)
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
