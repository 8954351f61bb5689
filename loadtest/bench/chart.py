"""The chart of a comparison: an SVG of bars, one panel a load, the roof as a line. No library.

Each panel has a scale of its own, beginning at zero. Colours and text stand on a white ground, so
that the file reads the same on dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from xml.sax.saxutils import escape

from loadtest.bench.document import Document
from loadtest.bench.measure import Kind
from loadtest.bench.report import decode_view, goodput, median, prefill_view
from loadtest.bench.svg import write_text

_WIDTH, _MARGIN, _LABELS, _FIGURES, _GAP = 920, 24, 118, 58, 36
_BAR, _PITCH, _TITLE = 15, 21, 30
_COLUMN = (_WIDTH - 2 * _MARGIN - _GAP) / 2
_OURS, _PEER, _INK, _PALE = "#0f766e", "#94a3b8", "#0f172a", "#475569"
_OURS_NAMES = "quire"  # every server of ours begins with it
_text = partial(write_text, fill=_INK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Bars by server; a server that was not measured has none."""

    title: str
    values: Mapping[str, float]
    roof: float = math.nan

    @property
    def height(self) -> int:
        """In pixels."""
        return _TITLE + _PITCH * len(self.values) + 14


def panels_of(document: Document) -> list[Panel]:
    """Decoding at each number of clients, prompts, goodput."""
    views = [
        *((f"{n} client{'s' * (n > 1)}, output tok/s", decode_view(document, n))
          for n in document.sizes.clients),
        (f"prompt of {document.sizes.prefill_tokens} tokens, prompt tok/s",
         prefill_view(document)),
    ]  # fmt: skip
    panels = [
        Panel(
            title=title,
            values={name: view.median(name, lambda row: row.speed) for name in view.servers},
            roof=median(view.roofs),
        )
        for title, view in views
    ]
    clients = 8 if 8 in document.sizes.clients else max(document.sizes.clients)
    first = decode_view(document, clients)
    panels.append(
        Panel(
            title=f"{clients} clients at once, first token after ms (less is better)",
            values={
                name: 1e3 * first.median(name, lambda row: row.summary.time_to_first_p50)
                for name in first.servers
            },
        )
    )
    if any(row.kind is Kind.ARRIVALS for row in document.results):
        values = {name: goodput(document, name) for name in document.servers}
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        panels.append(Panel(title="Poisson arrivals, good requests/s", values=known))
    return [panel for panel in panels if panel.values]


def draw(document: Document) -> str:
    """The whole SVG."""
    panels = panels_of(document)
    parts: list[str] = []
    top = 78.0
    for left, right in zip(panels[::2], [*panels[1::2], None], strict=False):
        parts += _panel(left, x=_MARGIN, y=top)
        if right is not None:
            parts += _panel(right, x=_MARGIN + _COLUMN + _GAP, y=top)
        top += max(left.height, right.height if right else 0)
    height = round(top + 10)
    title = f"Quire and its peers, {document.model}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"'
        f' width="{_WIDTH}" height="{height}" role="img" font-size="12"'
        ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    return "\n".join(
        [
            head,
            f"<title>{escape(title)}</title>",
            f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
            _text(title, x=_MARGIN, y=34, size=17, weight=600),
            _text(f"{document.date} · {document.machine}", x=_MARGIN, y=54, fill=_PALE, size=11),
            *parts,
            "</svg>\n",
        ]
    )


def _panel(panel: Panel, *, x: float, y: float) -> list[str]:
    start, room = x + _LABELS, _COLUMN - _LABELS - _FIGURES
    known = [value for value in (*panel.values.values(), panel.roof) if not math.isnan(value)]
    scale = room / max(known, default=1) if max(known, default=0) > 0 else 0.0
    parts = [_text(panel.title, x=x, y=y + 14, size=13, weight=600)]
    for number, (name, value) in enumerate(panel.values.items()):
        parts += _bar(name, value, x=start, y=y + _TITLE + number * _PITCH, scale=scale)
    if not math.isnan(panel.roof):
        at, bottom = start + panel.roof * scale, y + _TITLE + len(panel.values) * _PITCH
        parts.append(
            f'<path d="M{at:.1f} {y + _TITLE - 6:.1f}V{bottom:.1f}" stroke="{_INK}"'
            ' stroke-dasharray="4 3"/>'
        )
        label = f"roof {_figure(panel.roof)}"
        parts.append(_text(label, x=at, y=y + _TITLE - 9, fill=_PALE, size=10, anchor="end"))
    return parts


def _bar(name: str, value: float, *, x: float, y: float, scale: float) -> list[str]:
    length = 0.0 if math.isnan(value) else value * scale
    fill = _OURS if name.startswith(_OURS_NAMES) else _PEER
    box = f'x="{x:.1f}" y="{y:.1f}" width="{max(length, 1):.1f}" height="{_BAR}"'
    return [
        _text(name, x=x - 8, y=y + 12, anchor="end"),
        f'<rect {box} rx="2" fill="{fill}"/>',
        _text(_figure(value), x=x + length + 6, y=y + 12, fill=_PALE),
    ]


def _figure(value: float) -> str:
    if math.isnan(value):
        return "failed"
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
