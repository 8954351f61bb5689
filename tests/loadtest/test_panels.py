"""The dashboard's picture: every panel of the real dashboard is in it, with what was answered."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree as ET

import pytest

from loadtest.dashboard import DEPLOY, expand
from loadtest.panels import Time, draw, format_value, legend_of, lines_of

DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "quire.json").read_text())
TIME = Time(100.0, 110.0)
SERIES = [
    ({"instance": "zero"}, [(100.0, 0.0), (110.0, 0.0)]),
    ({"instance": "a<b"}, [(100.0, 0.5), (105.0, math.nan), (110.0, 2.0)]),
]


def test_every_panel_is_drawn() -> None:
    asked: list[str] = []

    def ask(query: str) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        asked.append(query)
        return SERIES

    svg, height = draw(DASHBOARD, ask, time=TIME, caption="a caption")
    root = ET.fromstring(svg)
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {panel["title"] for panel in DASHBOARD["panels"]} <= texts
    assert "a caption" in texts
    assert int(root.attrib["height"]) == height
    assert "nan" not in svg
    queries = [target["expr"] for each in DASHBOARD["panels"] for target in each.get("targets", ())]
    assert sorted(asked) == sorted(queries)


def test_a_panel_without_data_says_so() -> None:
    svg, _ = draw(DASHBOARD, lambda _: [], time=TIME, caption="")
    lines = [panel for panel in DASHBOARD["panels"] if panel["type"] == "timeseries"]
    assert svg.count("nothing of the kind happened") == len(lines) > 10


def test_what_is_not_zero_comes_first() -> None:
    panel = {"targets": [{"expr": "x", "legendFormat": "{{instance}} running"}]}
    lines = lines_of(panel, lambda _: SERIES)
    assert [line.legend for line in lines] == ["a<b running", "zero running"]


def test_queries_have_no_variables_left() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            assert "$" not in expand(target["expr"], DASHBOARD, seconds=60)


def test_legends() -> None:
    assert legend_of("{{status}} of {{ job }}", {"status": "200", "job": "api"}) == "200 of api"
    assert legend_of("{{unknown}}", {}) == ""


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (2.0, "s", "2 s"),
        (0.25, "percentunit", "25 %"),
        (5.0, "reqps", "5/s"),
        (3 * 2**20, "bytes", "3 MiB"),
        (12_345.0, "short", "12.3 k"),
        (math.nan, "s", "-"),
    ],
)
def test_figures(value: float, unit: str, text: str) -> None:
    assert format_value(value, unit) == text
