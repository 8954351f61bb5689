"""What must hold between the objects of an overlay. Each check raises AssertionError.

Schemas say that a manifest is well-formed; these say that its parts find each other, in the same
words as the program that they run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi.routing import APIRoute

from service.__main__ import app as command_line
from service.api import ROUTERS
from service.errors import Forbidden
from service.http.drain import CLOSE_TIMEOUT
from service.http.exposure import keyless_hosts
from service.settings import Settings, load_settings
from tests.deploy.manifests import (
    WORKLOADS,
    Object,
    all_containers,
    containers,
    environment,
    find,
    get,
    label,
    of_kind,
    pod_labels,
    pod_of,
    port_numbers,
    runs_quire,
    selected,
    selects,
)

MADE_BY_THE_OPERATOR = {("Secret", "quire-redis")}
SCALERS = ("HorizontalPodAutoscaler", "ScaledObject")
PINNED = re.compile(r"@sha256:[0-9a-f]{64}$")


def settings_of(objects: Sequence[Object], container: Object) -> Settings:
    """What the program makes of a container's environment; raises StartupError as it would."""
    known = environment(objects, container)
    return load_settings({}, environ={name: value or "1" for name, value in known.items()})


# --- selectors, targets, references -----------------------------------------------------------
def check_selectors(objects: Sequence[Object]) -> None:
    """Every selector selects something, and workloads select their own pods."""
    for workload in of_kind(objects, *WORKLOADS):
        selector = workload["spec"]["selector"]
        assert selected(objects, selector) == [workload], label(workload)
        for constraint in pod_of(workload).get("topologySpreadConstraints", []):
            own = selects(constraint["labelSelector"], pod_labels(workload))
            assert own, f"{label(workload)} spreads the pods of others"
    for service in of_kind(objects, "Service"):
        found = selected(objects, {"matchLabels": service["spec"]["selector"]})
        assert len(found) == 1, f"{label(service)} selects {len(found)} workloads"
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert len(selected(objects, budget["spec"]["selector"])) == 1, label(budget)
    for policy in of_kind(objects, "NetworkPolicy"):
        assert selected(objects, policy["spec"]["podSelector"]), label(policy)
        for peer in _pod_peers(policy):
            assert selected(objects, peer), f"{label(policy)}: {peer}"
    for monitor in of_kind(objects, "ServiceMonitor"):
        services = _monitored(objects, monitor)
        names = {service["spec"]["selector"]["app.kubernetes.io/name"] for service in services}
        assert names == {"quire-api", "quire-engine"}, f"{label(monitor)} finds {names}"


def _pod_peers(policy: Object) -> list[dict[str, Any]]:
    rules = [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]
    peers = [peer for rule in rules for peer in (*rule.get("from", []), *rule.get("to", []))]
    return [peer["podSelector"] for peer in peers if "podSelector" in peer]


def _monitored(objects: Sequence[Object], monitor: Object) -> list[Object]:
    services = of_kind(objects, "Service")
    return [
        service
        for service in services
        if selects(monitor["spec"]["selector"], service["metadata"]["labels"])
    ]


def check_targets(objects: Sequence[Object]) -> None:
    """What is scaled exists, is scaled by one, and sets no number of its own."""
    scaled = []
    for scaler in of_kind(objects, *SCALERS):
        reference = scaler["spec"]["scaleTargetRef"]
        target = get(objects, reference["kind"], reference["name"])
        assert target["apiVersion"] == reference["apiVersion"], label(scaler)
        assert "replicas" not in target["spec"], f"{label(target)} and {label(scaler)} both count"
        scaled.append(label(target))
    assert len(scaled) == len(set(scaled)), scaled
    assert "Deployment quire-api" in scaled


def check_routes(objects: Sequence[Object]) -> None:
    """Routes of a gateway lead to ports of the clients' Service."""
    for route in of_kind(objects, "HTTPRoute"):
        for backend in (each for rule in route["spec"]["rules"] for each in rule["backendRefs"]):
            service = get(objects, "Service", backend["name"])
            ports = {port["port"]: port["targetPort"] for port in service["spec"]["ports"]}
            assert ports.get(backend["port"]) == "http", f"{label(route)}: {backend}"


def check_references(objects: Sequence[Object]) -> None:
    """Config maps, secrets, accounts and volumes that pods name are there."""
    for workload, container in all_containers(objects):
        pod = pod_of(workload)
        get(objects, "ServiceAccount", pod["serviceAccountName"])
        claims = workload["spec"].get("volumeClaimTemplates", [])
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        volumes |= {claim["metadata"]["name"]: claim for claim in claims}
        for mount in container.get("volumeMounts", []):
            assert mount["name"] in volumes, f"{label(workload)}: no volume {mount['name']}"
        for volume in pod["volumes"]:
            if "configMap" in volume:
                get(objects, "ConfigMap", volume["configMap"]["name"])
        for variable in container.get("env", []):
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            if secret and ("Secret", secret["name"]) not in MADE_BY_THE_OPERATOR:
                assert secret["key"] in get(objects, "Secret", secret["name"])["data"]
    for workload in of_kind(objects, "StatefulSet"):
        get(objects, "Service", workload["spec"]["serviceName"])


# --- ports, probes, environment ----------------------------------------------------------------
def check_ports(objects: Sequence[Object]) -> None:
    """Every port that is named is one of the pods that are meant, and the settings listen there."""
    for service in of_kind(objects, "Service"):
        (workload,) = selected(objects, {"matchLabels": service["spec"]["selector"]})
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in port_numbers(workload), f"{label(service)}: {port}"
    for policy in of_kind(objects, "NetworkPolicy"):
        _check_policy_ports(objects, policy)
    for monitor in of_kind(objects, "ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["path"] == "/metrics"
            for service in _monitored(objects, monitor):
                assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    for workload, container in all_containers(objects):
        if runs_quire(container) and container.get("ports"):
            settings = settings_of(objects, container)
            numbers = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert numbers["admin"] == settings.admin_port, label(workload)
            assert numbers.get("http", settings.port) == settings.port, label(workload)
            assert not settings.is_loopback, f"{label(workload)}: nobody outside reaches the pod"


def _check_policy_ports(objects: Sequence[Object], policy: Object) -> None:
    own = selected(objects, policy["spec"]["podSelector"])
    for rule in policy["spec"].get("ingress", []):
        for port in rule.get("ports", []):
            assert all(port["port"] in port_numbers(each) for each in own), label(policy)
    for rule in policy["spec"].get("egress", []):
        peers = [
            workload
            for peer in rule["to"]
            if "podSelector" in peer
            for workload in selected(objects, peer["podSelector"])
        ]
        for port in rule["ports"]:
            assert all(port["port"] in port_numbers(each) for each in peers), label(policy)


def check_probes(objects: Sequence[Object]) -> None:
    """Each kind of probe asks the endpoint made for it, on the port that is not the clients'."""
    paths = {route.path for route in ROUTERS["health"].routes if isinstance(route, APIRoute)}
    for workload in of_kind(objects, *WORKLOADS):
        for container in containers(workload, with_init=False):
            for kind in ("startup", "liveness", "readiness"):
                probe = container.get(f"{kind}Probe")
                assert probe, f"{label(workload)} has no {kind} probe"
                if "tcpSocket" in probe:
                    assert probe["tcpSocket"]["port"] in port_numbers(workload)
                if not runs_quire(container):
                    continue
                ask = probe["httpGet"]
                assert ask["port"] == "admin", label(workload)
                assert ask["path"] in paths, f"{label(workload)}: {ask['path']}"
                word = {"startup": "startup", "liveness": "live", "readiness": "ready"}[kind]
                assert ask["path"] == f"/health/{word}", f"{label(workload)}: {kind} probe"
                allowed = accepts(settings_of(objects, container), "10.1.2.3:8001")
                assert allowed, f"{label(workload)}: probes name the pod by its address"


def accepts(settings: Settings, host: str) -> bool:
    """Whether the admin port serves requests for this host."""
    try:
        keyless_hosts(settings)({"headers": [(b"host", host.encode())]})
    except Forbidden:
        return False
    return True


LIBRARIES = {"TRITON_CACHE_DIR"}  # variables that a library reads


def check_environment(objects: Sequence[Object]) -> None:
    """The program accepts each environment, and Kubernetes adds nothing to it."""
    commands = {command.name or "" for command in command_line.registered_commands}
    commands |= {c.callback.__name__ for c in command_line.registered_commands if c.callback}
    for workload, container in all_containers(objects):
        if not runs_quire(container):
            continue
        assert container["args"][0] in commands, f"{label(workload)}: {container['args']}"
        settings_of(objects, container)
        assert pod_of(workload)["enableServiceLinks"] is False, label(workload)
        values = environment(objects, container)
        used = {name for text in values.values() for name in re.findall(r"\$\((\w+)\)", text or "")}
        others = {name for name in values if not name.startswith("QUIRE_")} - LIBRARIES
        assert others == used, f"{label(workload)} has {others} and uses {used}"
        declared = [variable["name"] for variable in container.get("env", [])]
        for name in used:  # Kubernetes replaces only what stands before
            user = next(key for key, text in values.items() if f"$({name})" in (text or ""))
            assert declared.index(name) < declared.index(user), label(workload)


def check_queue(objects: Sequence[Object]) -> None:
    """All meet in one queue, which is the Redis of these manifests, under a user that it knows."""
    rules = find(objects, "ConfigMap", "quire-redis")["data"]["render-acl.sh"]
    known = set(re.findall(r"^user (\w+) on", rules, re.MULTILINE))
    urls = set()
    for _workload, container in all_containers(objects):
        if runs_quire(container) and container["args"] != ["pull"]:
            url = environment(objects, container)["QUIRE_QUEUE"]
            assert url
            urls.add(url)
    assert len(urls) == 1, urls
    parts = urlsplit(urls.pop())
    service = get(objects, "Service", parts.hostname or "")
    assert parts.scheme in {"redis", "redis+cluster"}
    assert parts.port in {port["port"] for port in service["spec"]["ports"]}
    assert parts.username in known, f"{parts.username} is none of {known}"
    redis = get(objects, "StatefulSet", "quire-redis")
    (container,) = containers(redis, with_init=False)
    assert port_numbers(redis)["redis"] == parts.port
    assert container["command"][1].startswith("/etc/redis/")


# --- safety ----------------------------------------------------------------------------------
def check_hardening(objects: Sequence[Object]) -> None:
    """The restricted profile, a root nobody writes to, no token, bounded memory, a fixed image."""
    for workload, container in all_containers(objects):
        pod, name = pod_of(workload), f"{label(workload)}/{container['name']}"
        assert pod["automountServiceAccountToken"] is False, name
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False, name
        assert own["readOnlyRootFilesystem"] is True, name
        assert own["capabilities"] == {"drop": ["ALL"]}, name
        assert "memory" in container["resources"]["limits"], name
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
        image = container["image"]
        assert runs_quire(container) or PINNED.search(image), f"{name}: {image} has no digest"
        if runs_quire(container):
            assert re.fullmatch(r"quire:(cpu|cuda)", image), f"{name}: {image}"
            assert security["runAsUser"] == 10001, name
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounts, f"{name}: HOME lies on a root that cannot be written to"


def check_life_cycle(objects: Sequence[Object]) -> None:
    """Grace periods are longer than what is waited for, and an update never takes all API pods."""
    api = get(objects, "Deployment", "quire-api")
    (container,) = containers(api, with_init=False)
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    drain = settings_of(objects, container).drain_timeout
    grace = pod_of(api)["terminationGracePeriodSeconds"]
    end = drain + 2 * CLOSE_TIMEOUT + 5
    assert grace >= int(command[1]) + end, f"{grace} s is too short"
    assert int(command[1]) >= 3, "proxies hear of it only after the deletion began"
    assert api["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    engine = get(objects, "Deployment", "quire-engine")
    assert pod_of(engine)["terminationGracePeriodSeconds"] >= 10
    scaler = get(objects, "HorizontalPodAutoscaler", "quire-api")
    for budget in of_kind(objects, "PodDisruptionBudget"):
        (target,) = selected(objects, budget["spec"]["selector"])
        fewest = target["spec"].get("replicas") or scaler["spec"]["minReplicas"]
        assert 0 < budget["spec"]["maxUnavailable"] < fewest, label(budget)
    redis = get(objects, "StatefulSet", "quire-redis")
    (server,) = containers(redis, with_init=False)
    # A second server without a cluster would be another journal.
    assert redis["spec"]["replicas"] == (6 if "--cluster-enabled" in server["command"] else 1)


def check_redis_memory(objects: Sequence[Object]) -> None:
    """Redis refuses before the kernel kills it, keeps everything, and writes it down."""
    text = find(objects, "ConfigMap", "quire-redis")["data"]["redis.conf"]
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    options = {words[0]: words[1] for words in lines}
    assert options["appendonly"] == "yes"
    assert options["maxmemory-policy"] == "noeviction"
    limit = containers(get(objects, "StatefulSet", "quire-redis"), with_init=False)[0]
    bound = limit["resources"]["limits"]["memory"]
    assert bound.endswith("Mi")
    assert options["maxmemory"].endswith("mb")
    assert int(options["maxmemory"][:-2]) * 2 <= int(bound[:-2])


def check_scaling(objects: Sequence[Object]) -> None:
    """Engines that may all be gone are called by work that is accepted without them, and come."""
    api = get(objects, "Deployment", "quire-api")
    patient = settings_of(objects, containers(api, with_init=False)[0]).accept_without_engines
    scalers = of_kind(objects, "ScaledObject")
    assert patient <= bool(scalers), "calls wait for engines that nobody starts"
    for scaler in scalers:
        spec = scaler["spec"]
        assert patient or spec["minReplicaCount"] > 0, f"{label(scaler)}: nothing wakes an engine"
        assert spec["minReplicaCount"] < spec["maxReplicaCount"], label(scaler)
        assert spec["fallback"]["replicas"] >= max(1, spec["minReplicaCount"]), label(scaler)
        for trigger in spec["triggers"]:
            # KEDA starts the first one as soon as the figure exceeds this.
            assert float(trigger["metadata"]["activationThreshold"]) == 0, label(scaler)


CHECKS = (
    check_selectors,
    check_targets,
    check_routes,
    check_references,
    check_ports,
    check_probes,
    check_environment,
    check_queue,
    check_hardening,
    check_life_cycle,
    check_redis_memory,
    check_scaling,
)
