"""The overlays render, fit the schemas of two Kubernetes versions, and their parts find each other.

Each check of `checks` is also shown an overlay that was broken on purpose, and must see it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.errors import StartupError
from service.startup import name_of
from tests.deploy import checks
from tests.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    Object,
    containers,
    find,
    get,
    of_kind,
    pod_of,
    render,
)
from tests.deploy.schemas import OF_OPERATORS

Check = Callable[[Sequence[Object]], None]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.32", "1.37"])
def test_objects_fit_the_schemas(version: str) -> None:
    objects = {
        yaml.safe_dump(each): each
        for overlay in OVERLAYS
        for each in render(overlay)
        if each["kind"] not in OF_OPERATORS
    }
    assert len(objects) >= 25
    for each in objects.values():
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_of_operators_fit_their_schemas(overlay: str) -> None:
    objects = [each for each in render(overlay) if each["kind"] in OF_OPERATORS]
    assert {each["kind"] for each in objects} == {
        "autoscale": OF_OPERATORS.keys() - {"HTTPRoute"}, "gateway": OF_OPERATORS.keys(),
    }.get(overlay, set())  # fmt: skip
    for each in objects:
        jsonschema.validate(each, OF_OPERATORS[each["kind"]])


MISFITS: dict[str, Callable[[Object], object]] = {
    "HTTPRoute": lambda spec: spec["rules"][0]["backendRefs"][0].pop("port"),
    "ScaledObject": lambda spec: spec["triggers"][0]["metadata"].update(threshold=48),
    "ServiceMonitor": lambda spec: spec["endpoints"][0].update(intervall="5s"),
    "PrometheusRule": lambda spec: spec["groups"][0]["rules"][0].pop("expr"),
}


@pytest.mark.parametrize("kind", OF_OPERATORS)
def test_an_operators_schema_refuses_what_does_not_fit(kind: str) -> None:
    (each,) = of_kind(render("gateway"), kind)
    MISFITS[kind](each["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(each, OF_OPERATORS[kind])


def test_a_schema_refuses_what_does_not_fit() -> None:
    deployment = get(render("cpu"), "Deployment", "quire-api")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 45
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.32", strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_are_used_once_and_all_live_in_one_namespace(overlay: str) -> None:
    objects = render(overlay)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))
    namespaces = {each["metadata"].get("namespace") for each in objects[1:]}
    assert objects[0]["kind"] == "Namespace"
    assert namespaces == {objects[0]["metadata"]["name"]}


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_parts_find_each_other(overlay: str, check: Check) -> None:
    check(render(overlay))


def api(objects: Sequence[Object]) -> Object:
    return get(objects, "Deployment", "quire-api")


def engine(objects: Sequence[Object]) -> Object:
    return get(objects, "Deployment", "quire-engine")


def container(workload: Object) -> Any:
    return containers(workload)[0]


def settings(objects: Sequence[Object]) -> dict[str, str]:
    data: dict[str, str] = find(objects, "ConfigMap", "quire-settings")["data"]
    return data


def set_selector(kind: str, name: str, *path: str) -> Callable[[Sequence[Object]], None]:
    def change(objects: Sequence[Object]) -> None:
        place = get(objects, kind, name)["spec"]
        for step in path:
            place = place[step]
        place["app.kubernetes.io/name"] = "quire-apis"

    return change


BROKEN: dict[str, tuple[Check, Callable[[list[Object]], object]]] = {
    "service selects nothing": (
        checks.check_selectors,
        set_selector("Service", "quire-api", "selector"),
    ),
    "budget selects nothing": (
        checks.check_selectors,
        set_selector("PodDisruptionBudget", "quire-engine", "selector", "matchLabels"),
    ),
    "policy selects nothing": (
        checks.check_selectors,
        set_selector("NetworkPolicy", "redis", "podSelector", "matchLabels"),
    ),
    "monitor finds one service": (
        checks.check_selectors,
        lambda o: get(o, "Service", "quire-engine-admin")["metadata"]["labels"].pop("quire/scrape"),
    ),
    "pods spread beside others": (
        checks.check_selectors,
        lambda o: pod_of(engine(o))["topologySpreadConstraints"][0].update(
            labelSelector={"matchLabels": {"app.kubernetes.io/name": "quire-api"}}
        ),
    ),
    "scaler scales nobody": (
        checks.check_targets,
        lambda o: get(o, "ScaledObject", "quire-engine")["spec"]["scaleTargetRef"].update(
            name="engine"
        ),
    ),
    "two count replicas": (
        checks.check_targets,
        lambda o: engine(o)["spec"].update(replicas=2),
    ),
    "config map is missing": (
        checks.check_references,
        lambda o: o.remove(find(o, "ConfigMap", "quire-redis")),
    ),
    "volume is missing": (
        checks.check_references,
        lambda o: pod_of(api(o))["volumes"].clear(),
    ),
    "service's port is none": (
        checks.check_ports,
        lambda o: get(o, "Service", "quire-api")["spec"]["ports"][0].update(targetPort="web"),
    ),
    "monitor's port is none": (
        checks.check_ports,
        lambda o: get(o, "ServiceMonitor", "quire")["spec"]["endpoints"][0].update(port="http"),
    ),
    "policy's port is none": (
        checks.check_ports,
        lambda o: get(o, "NetworkPolicy", "metrics")["spec"]["ingress"][0]["ports"][0].update(
            port="metrics"
        ),
    ),
    "setting moves the port": (
        checks.check_ports,
        lambda o: settings(o).update(QUIRE_ADMIN_PORT="9000"),
    ),
    "listens on the loopback": (
        checks.check_ports,
        lambda o: settings(o).update(QUIRE_HOST="127.0.0.1"),
    ),
    "probe asks a path that is none": (
        checks.check_probes,
        lambda o: container(api(o))["livenessProbe"]["httpGet"].update(path="/healthz"),
    ),
    "liveness depends on the queue": (
        checks.check_probes,
        lambda o: container(api(o))["livenessProbe"]["httpGet"].update(path="/health/ready"),
    ),
    "probes are refused for their host": (
        checks.check_probes,
        lambda o: settings(o).update(QUIRE_HOST="127.0.0.1"),
    ),
    "probe is missing": (
        checks.check_probes,
        lambda o: container(engine(o)).pop("startupProbe"),
    ),
    "role is none": (
        checks.check_environment,
        lambda o: container(engine(o)).update(args=["worker"]),
    ),
    "setting is none": (
        checks.check_environment,
        lambda o: settings(o).update(QUIRE_WORKERS="2"),
    ),
    "setting is out of range": (
        checks.check_environment,
        lambda o: settings(o).update(QUIRE_PORT="80000"),
    ),
    "service links": (
        checks.check_environment,
        lambda o: pod_of(api(o)).update(enableServiceLinks=True),
    ),
    "password comes after its use": (
        checks.check_environment,
        lambda o: container(api(o))["env"].reverse(),
    ),
    "queue is elsewhere": (
        checks.check_queue,
        lambda o: container(api(o))["env"][1].update(value="redis://quire:$(P)@redis:6379/0"),
    ),
    "user is unknown": (
        checks.check_queue,
        lambda o: [
            each["env"][1].update(value="redis://default:$(P)@quire-redis:6379/0")
            for each in (container(api(o)), container(engine(o)))
        ],
    ),
    "root can be written to": (
        checks.check_hardening,
        lambda o: container(api(o))["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    "image without a digest": (
        checks.check_hardening,
        lambda o: container(get(o, "StatefulSet", "quire-redis")).update(image="redis:7.4.11"),
    ),
    "memory without a bound": (
        checks.check_hardening,
        lambda o: container(api(o))["resources"]["limits"].pop("memory"),
    ),
    "grace is shorter than the drain": (
        checks.check_life_cycle,
        lambda o: settings(o).update(QUIRE_DRAIN_TIMEOUT="616"),
    ),
    "nothing wakes the first engine": (
        checks.check_scaling,
        lambda o: settings(o).update(QUIRE_ACCEPT_WITHOUT_ENGINES="false"),
    ),
    "one request is too few": (
        checks.check_scaling,
        lambda o: get(o, "ScaledObject", "quire-engine")["spec"]["triggers"][0]["metadata"].update(
            activationThreshold="5"
        ),
    ),
    "calls wait for engines that nobody starts": (
        checks.check_scaling,
        lambda o: o.remove(get(o, "ScaledObject", "quire-engine")),
    ),
    "budget forbids every drain": (
        checks.check_life_cycle,
        lambda o: get(o, "PodDisruptionBudget", "quire-api")["spec"].update(maxUnavailable=0),
    ),
    "route leads nowhere": (
        checks.check_routes,
        lambda o: get(o, "HTTPRoute", "quire")["spec"]["rules"][0]["backendRefs"][0].update(
            name="api"
        ),
    ),
    "route's port is none": (
        checks.check_routes,
        lambda o: get(o, "HTTPRoute", "quire")["spec"]["rules"][0]["backendRefs"][0].update(
            port=8000
        ),
    ),
    "redis evicts": (
        checks.check_redis_memory,
        lambda o: find(o, "ConfigMap", "quire-redis")["data"].update(
            {"redis.conf": "appendonly yes\nmaxmemory 768mb\nmaxmemory-policy allkeys-lru\n"}
        ),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_seen(what: str) -> None:
    check, break_it = BROKEN[what]
    objects = render("gateway")  # it has everything that autoscale has
    break_it(objects)
    with pytest.raises((AssertionError, KeyError, StartupError)):
        check(objects)


def test_every_check_is_shown_something_broken() -> None:
    assert {check for check, _ in BROKEN.values()} == set(checks.CHECKS)


def test_the_operators_rules_are_those_of_compose() -> None:
    ours = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
    theirs = get(render("autoscale"), "PrometheusRule", "quire")
    assert theirs["spec"] == ours


def test_compiled_kernels_are_kept_on_a_volume() -> None:
    """Triton writes them at the start; the root is read-only, and /tmp ends with the container."""
    (engine,) = (
        each for each in render("gpu")
        if each["kind"] == "Deployment" and each["metadata"]["name"] == "quire-engine"
    )  # fmt: skip
    (container,) = engine["spec"]["template"]["spec"]["containers"]
    folder = {each["name"]: each.get("value") for each in container["env"]}["TRITON_CACHE_DIR"]
    assert any(
        folder.startswith(f"{mount['mountPath']}/") and mount["name"] == "models"
        for mount in container["volumeMounts"]
    )


def test_the_gpu_overlay_asks_for_gpus_where_they_compute() -> None:
    objects = render("gpu")
    limits = {
        each["metadata"]["name"]: containers(each)[0]["resources"]["limits"]
        for each in of_kind(objects, "Deployment")
    }
    assert limits["quire-engine"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in limits["quire-api"]
    images = {
        each["metadata"]["name"]: containers(each)[0]["image"]
        for each in of_kind(objects, "Deployment")
    }
    assert images == {"quire-engine": "quire:cuda", "quire-api": "quire:cpu"}


def test_autoscaling_counts_what_engines_hold() -> None:
    """Lag alone would scale to nothing while a dead engine's requests wait for the next one."""
    tokens, requests = (
        trigger["metadata"]["query"]
        for trigger in get(render("autoscale"), "ScaledObject", "quire-engine")["spec"]["triggers"]
    )
    assert "quire_model_queue_tokens" in tokens
    assert "quire_model_queue_requests" in requests
    assert "quire_model_queue_running" in requests


def test_the_scaler_counts_the_model_that_its_engines_serve() -> None:
    objects = render("autoscale")
    served = checks.settings_of(objects, container(engine(objects)))
    (source,) = served.sources
    name = source.name or name_of(source.source, Path("model.gguf"))
    for trigger in get(objects, "ScaledObject", "quire-engine")["spec"]["triggers"]:
        models = re.findall(r'model="([^"]*)"', trigger["metadata"]["query"])
        assert set(models) == {name}


def test_the_route_leads_to_the_api_and_only_the_gateway_comes_in() -> None:
    objects = render("gateway")
    (rule,) = get(objects, "HTTPRoute", "quire")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s"}, "a long answer is cut off"
    assert settings(objects)["QUIRE_VLLM_METRICS"] == "true"


def test_autoscaling_begins_at_none() -> None:
    objects = render("autoscale")
    assert get(objects, "ScaledObject", "quire-engine")["spec"]["minReplicaCount"] == 0
    assert settings(objects)["QUIRE_ACCEPT_WITHOUT_ENGINES"] == "true"
    assert "QUIRE_ACCEPT_WITHOUT_ENGINES" not in settings(render("cpu"))


def test_each_model_has_engines_of_its_own() -> None:
    """API replicas serve them all."""
    objects = render("models")
    models = list(checks.settings_of(objects, container(api(objects))).model)
    assert len(models) == 2
    engines = [engine(objects), get(objects, "Deployment", "quire-engine-second")]
    for workload, model in zip(engines, models, strict=True):
        for each in containers(workload):
            assert checks.settings_of(objects, each).model == (model,)
