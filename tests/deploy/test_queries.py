"""Every query, of the alerts, the dashboard and the scaler, names series and labels that exist."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import DEPLOY, get, render
from tests.deploy.promql import Named, check_query, known_series, series_of

DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "quire.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]
}
PANELS: dict[str, dict[str, Any]] = {
    panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"
}


def test_the_parser_sees_series_and_nothing_else() -> None:
    query = (
        'sum by (le) (rate(a_bucket{le="+Inf", x=~"b(c)"}[5m])) / on (z) count(d offset 10m) or e'
    )
    assert series_of(query) == [
        Named("a_bucket", {"le": ("=", "+Inf"), "x": ("=~", "b(c)")}), Named("d"), Named("e"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "query",
    [
        "rate(quire_tokens_total[5m])",
        'quire_requests_finished_total{cause="stop"}',
        'quire_requests_finished_total{reason="stopped"}',
        "sum by (reason) (quire_kv_blocks)",
        "quire_steps",
    ],
)
def test_what_does_not_exist_is_seen(query: str) -> None:
    with pytest.raises(AssertionError):
        check_query(query)


@pytest.mark.parametrize("alert", ALERTS)
def test_alerts_name_what_exists(alert: str) -> None:
    rule = ALERTS[alert]
    check_query(rule["expr"])
    assert rule["labels"]["severity"] in {"warning", "critical"}
    shown = rule["annotations"]["summary"] + rule["annotations"]["description"]
    used = set(re.findall(r"\$labels\.(\w+)", shown))
    assert used <= {"instance", "job"}, "labels that the expression keeps"


@pytest.mark.parametrize("title", PANELS)
def test_panels_name_what_exists(title: str) -> None:
    panel = PANELS[title]
    assert panel["description"]
    for target in panel["targets"]:
        check_query(re.sub(r"\$__(rate_interval|range)", "5m", target["expr"]))
        assert target["datasource"]["uid"] == "${datasource}"


def test_variables_of_the_dashboard_name_what_exists() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", " ".join(_expressions()))) - {"__rate_interval", "__range"}
    assert used <= set(variables)
    asked = variables["instance"]["query"]["query"]
    series, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", asked).groups()  # type: ignore[union-attr]
    assert series in known_series()
    assert label == "instance"


def _expressions() -> list[str]:
    return [target["expr"] for panel in PANELS.values() for target in panel["targets"]]


def test_panels_lie_beside_each_other() -> None:
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & places, panel["title"]
        places |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_scaler_asks_for_what_exists() -> None:
    for trigger in get(render("autoscale"), "ScaledObject", "quire-engine")["spec"]["triggers"]:
        assert trigger["type"] == "prometheus"
        check_query(trigger["metadata"]["query"])
