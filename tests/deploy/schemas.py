"""JSON schemas of the operators' objects in the manifests: only the fields that these use.

Written from the resource definitions of Gateway API v1, KEDA v2 and the Prometheus operator v1.
Like an API server with strict validation, they refuse a field that they do not know.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
WORD = {"type": "string", "minLength": 1}
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
SECONDS = {"type": "integer", "minimum": 0}
COUNT = {"type": "integer", "minimum": 0}


def record(required: Schema | None = None, /, **optional: Schema) -> Schema:
    """An object that has the required fields, may have the optional ones, and no others."""
    fields = {**(required or {}), **optional}
    return {
        "type": "object",
        "properties": fields,
        "required": sorted(required or {}),
        "additionalProperties": False,
    }


def several(item: Schema, *, most: int | None = None) -> Schema:
    """An array of at least one item."""
    return {"type": "array", "items": item, "minItems": 1, **({"maxItems": most} if most else {})}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
PATH_MATCH = record(
    {"type": one_of("Exact", "PathPrefix", "RegularExpression"), "value": {"pattern": "^/"}}
)
ROUTE_RULE = record(
    {"backendRefs": several(record({"name": NAME, "port": PORT}, weight=COUNT), most=16)},
    matches=several(record(path=PATH_MATCH, method=WORD)),
    timeouts=record(request=DURATION, backendRequest=DURATION),
)
HTTP_ROUTE = record(
    {
        "parentRefs": several(record({"name": NAME}, namespace=NAME, sectionName=NAME), most=32),
        "rules": several(ROUTE_RULE, most=16),
    },
    hostnames=several(NAME, most=16),
)

SCALING_RULES = record(
    stabilizationWindowSeconds=SECONDS,
    selectPolicy=one_of("Max", "Min", "Disabled"),
    policies=several(
        record({"type": one_of("Pods", "Percent"), "value": COUNT, "periodSeconds": SECONDS})
    ),
)
PROMETHEUS_TRIGGER = record(
    {
        "type": one_of("prometheus"),
        # KEDA parses all values of its scalers from strings.
        "metadata": record(
            {"serverAddress": WORD, "query": WORD, "threshold": WORD},
            activationThreshold=WORD,
            ignoreNullValues=one_of("true", "false"),
        ),
    },
    name=NAME,
    metricType=one_of("AverageValue", "Value"),
)
SCALED_OBJECT = record(
    {
        "scaleTargetRef": record({"name": NAME}, apiVersion=WORD, kind=WORD),
        "triggers": several(PROMETHEUS_TRIGGER),
    },
    minReplicaCount=COUNT,
    maxReplicaCount=COUNT,
    pollingInterval=SECONDS,
    cooldownPeriod=SECONDS,
    fallback=record({"failureThreshold": COUNT, "replicas": COUNT}),
    advanced=record(
        horizontalPodAutoscalerConfig=record(
            behavior=record(scaleUp=SCALING_RULES, scaleDown=SCALING_RULES)
        )
    ),
)

SERVICE_MONITOR = record(
    {
        "selector": record(matchLabels=WORDS),
        "endpoints": several(
            record({"port": WORD}, path=WORD, interval=DURATION, scrapeTimeout=DURATION)
        ),
    },
    jobLabel=WORD,
)
RULE = record(
    {"alert": WORD, "expr": WORD, "labels": WORDS, "annotations": WORDS}, **{"for": DURATION}
)
PROMETHEUS_RULE = record({"groups": several(record({"name": WORD, "rules": several(RULE)}))})

METADATA = record({"name": NAME}, namespace=NAME, labels=WORDS, annotations=WORDS)
_SPECS = {
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): HTTP_ROUTE,
    ("keda.sh/v1alpha1", "ScaledObject"): SCALED_OBJECT,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): SERVICE_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PROMETHEUS_RULE,
}
OF_OPERATORS: dict[str, Schema] = {
    kind: record(
        {"apiVersion": one_of(version), "kind": one_of(kind), "metadata": METADATA, "spec": spec}
    )
    for (version, kind), spec in _SPECS.items()
}
"""Kind -> schema. None of them is part of Kubernetes."""
