"""Who may talk to whom, as network policies decide it. For policies like ours: they only allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.deploy.manifests import Object, get, of_kind, pod_labels, port_numbers, selects


@dataclass(frozen=True, slots=True)
class Peer:
    """A pod of a namespace. `ours` if it is the namespace that the policies live in."""

    labels: Mapping[str, str]
    namespace: str
    ours: bool = False
    gateway: bool = False  # whether the namespace is labelled as that of the gateway's proxies


def pod(objects: Sequence[Object], kind: str, name: str) -> Peer:
    workload = get(objects, kind, name)
    return Peer(pod_labels(workload), workload["metadata"]["namespace"], ours=True)


def stranger(namespace: str, *, gateway: bool = False) -> Peer:
    """A pod without labels, elsewhere."""
    return Peer({}, namespace, gateway=gateway)


def allowed(objects: Sequence[Object], source: Peer, target: Peer, port: int) -> bool:
    """Whether a connection is let out by its source's policies and in by its target's."""
    return _passes(objects, "Egress", source, target, port) and _passes(
        objects, "Ingress", target, source, port
    )


def _passes(
    objects: Sequence[Object], direction: str, subject: Peer, other: Peer, port: int
) -> bool:
    """No policy selects the subject in this direction, or one of those that do allows it."""
    if not subject.ours:
        return True
    policies = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy")
        if direction in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], subject.labels)
    ]
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), [])]
    target = subject if direction == "Ingress" else other
    peers = "from" if direction == "Ingress" else "to"
    return not policies or any(
        (peers not in rule or any(_is(peer, other) for peer in rule[peers]))
        and any(_number(objects, each["port"], target) == port for each in rule["ports"])
        for rule in rules
    )


def _is(peer: Mapping[str, Mapping[str, object]], other: Peer) -> bool:
    if "ipBlock" in peer:
        return False  # addresses outside the cluster
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace}
        labels |= {"quire/gateway": "true"} if other.gateway else {}
        return selects(peer["namespaceSelector"], labels)
    return other.ours and selects(peer["podSelector"], other.labels)


def _number(objects: Sequence[Object], port: str | int, target: Peer) -> int | None:
    """A named port is the one of the target's containers."""
    if isinstance(port, int):
        return port
    for workload in of_kind(objects, "Deployment", "StatefulSet"):
        if target.ours and pod_labels(workload) == target.labels:
            return port_numbers(workload).get(port)
    return None
