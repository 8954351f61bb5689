"""Panels: Grafana's dashboard JSON and Prometheus' answers, drawn as one SVG. No library.

It knows what our dashboard uses: rows, single figures, and lines over time with their legends,
units and places on the grid. Other kinds of panels are drawn as lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from loadtest.bench.svg import write_text

WIDTH = 1360
_COLUMNS, _UNIT, _GAP, _TOP = 24, 21.0, 8.0, 46.0
_GROUND, _CARD, _EDGE, _INK, _PALE = "#f4f5f7", "#ffffff", "#e2e5ea", "#1f2933", "#6b7785"
_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")
_LEGENDS = 6  # of a panel; what does not fit into its width is not drawn either
_text = partial(write_text, fill=_INK)


@dataclass(frozen=True, slots=True)
class Line:
    """A series: its legend and its points (seconds, value)."""

    legend: str
    points: Sequence[tuple[float, float]]

    @property
    def last(self) -> float:
        """Its newest value; NaN of none."""
        return self.points[-1][1] if self.points else math.nan


Ask = Callable[[str], Sequence[tuple[Mapping[str, str], Sequence[tuple[float, float]]]]]
"""A query -> (labels, points) of each series."""


def legend_of(template: str, labels: Mapping[str, str]) -> str:
    """`{{name}}` replaced by labels, as Grafana does."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda name: labels.get(name[1], ""), template).strip()


def format_value(value: float, unit: str | None) -> str:
    """A figure with its unit, short."""
    if not math.isfinite(value):
        return "-"
    if unit == "s":
        return f"{value:.2g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    suffix = "/s" if unit in {"reqps", "ops"} else ""
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g} k{suffix}"
    return f"{value:.4g}{suffix}"


@dataclass(frozen=True, slots=True)
class Time:
    """What every panel shows, in seconds."""

    begin: float
    end: float


def draw(dashboard: Mapping[str, Any], ask: Ask, *, time: Time, caption: str) -> tuple[str, int]:
    """The SVG and its height."""
    panels = [each for each in dashboard["panels"] if "gridPos" in each]
    rows = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in panels)
    height = math.ceil(_TOP + rows * _UNIT + _GAP)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        f' width="{WIDTH}" height="{height}" font-size="11"'
        ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    parts = [
        head,
        f'<rect width="{WIDTH}" height="{height}" fill="{_GROUND}"/>',
        _text(str(dashboard["title"]), x=_GAP + 4, y=29, size=18, weight=600),
        _text(caption, x=WIDTH - _GAP - 4, y=28, fill=_PALE, anchor="end"),
    ]
    for panel in panels:
        parts += _panel(panel, ask, time=time)
    return "\n".join([*parts, "</svg>\n"]), height


def lines_of(panel: Mapping[str, Any], ask: Ask) -> list[Line]:
    """What a panel's queries give; first those that are not zero all the time."""
    found = [
        Line(legend_of(target.get("legendFormat", ""), labels), points)
        for target in panel.get("targets", ())
        for labels, points in ask(target["expr"])
    ]
    return sorted(
        (line for line in found if line.points),
        key=lambda line: not any(value for _, value in line.points),
    )


def _panel(panel: Mapping[str, Any], ask: Ask, *, time: Time) -> list[str]:
    place = panel["gridPos"]
    column = (WIDTH - _GAP) / _COLUMNS
    x, y = _GAP + place["x"] * column, _TOP + place["y"] * _UNIT
    width, height = place["w"] * column - _GAP, place["h"] * _UNIT - _GAP
    title = str(panel.get("title", ""))
    if panel["type"] == "row":
        return [_text(title, x=x + 4, y=y + 14, size=13, weight=600)]
    unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit")
    lines = lines_of(panel, ask)
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    parts = [
        f'<rect {box} rx="4" fill="{_CARD}" stroke="{_EDGE}"/>',
        _text(title, x=x + 10, y=y + 17, weight=600),
    ]
    if panel["type"] in {"stat", "gauge"}:
        value = format_value(lines[0].last, unit) if lines else "no data"
        return [*parts, _text(value, x=x + width / 2, y=y + height - 16, size=26, anchor="middle")]
    if not lines:
        where = {"x": x + width / 2, "y": y + height / 2 + 6}
        return [*parts, _text("nothing of the kind happened", **where, fill=_PALE, anchor="middle")]
    place = _Place(x=x + 52, y=y + 28, width=width - 64, height=height - 60)
    legend = _legend(lines, x=x + 10, y=y + height - 9, width=width - 20)
    return [*parts, *_chart(lines, unit, place, time=time), *legend]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    x: float
    y: float
    width: float
    height: float


def _chart(lines: Sequence[Line], unit: str | None, place: _Place, *, time: Time) -> list[str]:
    """Lines over time, zero at the bottom."""
    values = [value for line in lines for _, value in line.points if math.isfinite(value)]
    top = _ceiling(max(values, default=0.0), unit)
    bottom = place.y + place.height
    parts = []
    for share in (0.0, 0.5, 1.0):
        level = bottom - place.height * share
        parts.append(f'<path d="M{place.x:.1f} {level:.1f}h{place.width:.1f}" stroke="{_EDGE}"/>')
        label = format_value(top * share, unit)
        parts.append(_text(label, x=place.x - 6, y=level + 4, fill=_PALE, size=10, anchor="end"))
    scale = place.width / max(time.end - time.begin, 1)
    for number, line in enumerate(lines):
        points = " ".join(
            f"{place.x + scale * (at - time.begin):.1f},{bottom - place.height * value / top:.1f}"
            for at, value in line.points
            if math.isfinite(value)
        )
        stroke = f'stroke="{_COLOURS[number % len(_COLOURS)]}" stroke-width="1.6"'
        parts.append(f'<polyline points="{points}" fill="none" {stroke}/>')
    for at, label, anchor in (
        (place.x, "0", "middle"),
        (place.x + place.width, f"{time.end - time.begin:.0f} s", "end"),
    ):
        parts.append(_text(label, x=at, y=bottom + 13, fill=_PALE, size=10, anchor=anchor))
    return parts


def _ceiling(value: float, unit: str | None) -> float:
    """The next of 1, 2, 5 times a power of ten, of MiB where these are shown; 1 of nothing."""
    if value <= 0:
        return 1.0
    if unit == "bytes":
        return 2.0**20 * _ceiling(value / 2**20, None)
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def _legend(lines: Sequence[Line], *, x: float, y: float, width: float) -> list[str]:
    parts: list[str] = []
    at = x
    for number, line in enumerate(lines[:_LEGENDS]):
        if not line.legend:
            continue
        room = 22 + 5.6 * len(line.legend)
        if at + room > x + width:
            break
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(f'<rect x="{at:.1f}" y="{y - 5:.1f}" width="10" height="3" fill="{colour}"/>')
        parts.append(_text(line.legend, x=at + 14, y=y, fill=_PALE, size=10))
        at += room
    return parts
