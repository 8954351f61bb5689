"""An overlay's objects as `kubectl kustomize` renders them, and ways to look at them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
OVERLAYS = ("cpu", "gpu", "models", "autoscale", "gateway", "redis-cluster")
WORKLOADS = ("Deployment", "StatefulSet")

Object = dict[str, Any]


@cache
def _rendered(overlay: str) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(DEPLOY / "kubernetes" / "overlays" / overlay)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return done.stdout


def render(overlay: str) -> list[Object]:
    """The overlay's objects, the caller's own to change."""
    return list(yaml.load_all(_rendered(overlay), Loader=yaml.CSafeLoader))


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def get(objects: Sequence[Object], kind: str, name: str) -> Object:
    """The object, or an AssertionError that says what there is."""
    named = {each["metadata"]["name"]: each for each in of_kind(objects, kind)}
    assert name in named, f"no {kind} {name}; there are {sorted(named)}"
    return named[name]


def find(objects: Sequence[Object], kind: str, prefix: str) -> Object:
    """The one whose name begins so: generated names end in a hash."""
    (found,) = [
        each for each in of_kind(objects, kind) if each["metadata"]["name"].startswith(prefix)
    ]
    return found


def label(thing: Object) -> str:
    return f"{thing['kind']} {thing['metadata']['name']}"


def pod_of(workload: Object) -> Object:
    """The pod's spec."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def pod_labels(workload: Object) -> dict[str, str]:
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def containers(workload: Object, *, with_init: bool = True) -> list[Object]:
    pod = pod_of(workload)
    return [*pod["containers"], *(pod.get("initContainers", []) if with_init else [])]


def all_containers(objects: Sequence[Object]) -> Iterator[tuple[Object, Object]]:
    """(workload, container), those that run once at the start included."""
    for workload in of_kind(objects, *WORKLOADS):
        for container in containers(workload):
            yield workload, container


def runs_quire(container: Object) -> bool:
    return str(container["image"]).startswith("quire:")


def environment(objects: Sequence[Object], container: Object) -> dict[str, str | None]:
    """Names and values; None where the value is known only in the cluster."""
    found: dict[str, str | None] = {}
    for source in container.get("envFrom", []):
        found |= get(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        found[variable["name"]] = variable.get("value")
    return found


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A label selector as Kubernetes reads it; of expressions only `In`."""
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def selected(objects: Sequence[Object], selector: Mapping[str, Any]) -> list[Object]:
    """The workloads whose pods a selector selects."""
    return [each for each in of_kind(objects, *WORKLOADS) if selects(selector, pod_labels(each))]


def port_numbers(workload: Object) -> dict[str, int]:
    """Name -> number of all ports of a workload's pods."""
    return {
        port["name"]: port["containerPort"]
        for container in containers(workload)
        for port in container.get("ports", [])
    }
