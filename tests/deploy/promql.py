"""The series that PromQL names, and the series that there are, with their labels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from prometheus_client.metrics import MetricWrapperBase

from service.messages import FinishReason
from service.observability.metrics import Metrics
from service.queues.contract import SubmitStatus
from service.queues.observer import QueueEvent

OF_PROMETHEUS = {"up", "ALERTS"}
FROM_SCRAPING = {"job", "instance", "namespace"}
VALUES = {
    ("quire_requests_finished_total", "reason"): {reason.value for reason in FinishReason},
    ("quire_requests_refused_total", "reason"): {status.value for status in SubmitStatus},
    ("quire_queue_events_total", "event"): {event.value for event in QueueEvent},
    ("quire_kv_blocks", "state"): {"used", "cached", "free"},
}

_WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "inf", "nan"}
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
_SERIES = re.compile(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\w|\s*\()")
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")


@dataclass(frozen=True, slots=True)
class Named:
    """A series in a query: `matchers` by label, as (operator, value)."""

    name: str
    matchers: dict[str, tuple[str, str]] = field(default_factory=dict)


def series_of(query: str) -> list[Named]:
    """All series that a query names."""
    bare = _GROUPING.sub(" ", re.sub(r"\[[^\]]*\]", " ", query))
    bare = re.sub(r"\boffset\s+\w+", " ", bare)
    found = []
    for name, braces in _SERIES.findall(bare):
        if name not in _WORDS:
            matchers = {key: (how, value) for key, how, value in _MATCHER.findall(braces)}
            found.append(Named(name, matchers))
    return found


def grouped_by(query: str) -> set[str]:
    """Labels that a query groups or joins by."""
    lists = (names for _, names in _GROUPING.findall(query))
    return {name.strip() for names in lists for name in names.split(",") if name.strip()}


def known_series() -> dict[str, set[str]]:
    """Every sample's name, as Prometheus sees it, and its labels."""
    known: dict[str, set[str]] = {}
    metrics = Metrics()
    wrapped = [each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)]
    families = {next(iter(each.describe())).name: set(each._labelnames) for each in wrapped}
    for family in metrics.registry.collect():
        labels = families.get(family.name, set(getattr(family, "_labelnames", ())))
        if family.type == "counter":
            known[f"{family.name}_total"] = labels
        elif family.type == "histogram":
            known[f"{family.name}_bucket"] = labels | {"le"}
            known[f"{family.name}_sum"] = known[f"{family.name}_count"] = labels
        else:
            known[family.name] = labels
    return known


def check_query(query: str) -> None:
    """Raises AssertionError where a query names a series, label or value that there is not."""
    known, named = known_series(), series_of(query)
    assert named, f"names nothing: {query}"
    labels = set(FROM_SCRAPING)
    for each in named:
        if each.name in OF_PROMETHEUS:
            continue
        assert each.name in known, f"no series {each.name} in: {query}"
        labels |= known[each.name]
        for label, (how, value) in each.matchers.items():
            assert label in known[each.name] | FROM_SCRAPING, f"{each.name} has no label {label}"
            values = VALUES.get((each.name, label))
            if values and how in {"=", "!="}:
                assert value in values, f"{each.name}: {label} is never {value}"
    assert grouped_by(query) <= labels, f"groups by {grouped_by(query) - labels}: {query}"
