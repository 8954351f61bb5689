"""The network policies let through what must talk, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.deploy.manifests import OVERLAYS, Object, get, render
from tests.deploy.network import Peer, allowed, pod, stranger

API, ADMIN, REDIS, BUS, NAMES = 8000, 8001, 6379, 16379, 53
OURS = {
    ("api", "redis", REDIS),
    ("engine", "redis", REDIS),
    ("api", "names", NAMES),
    ("engine", "names", NAMES),
}
PEERS = {("redis", "other redis", REDIS), ("redis", "other redis", BUS), ("redis", "names", NAMES)}
SCRAPES = {("monitoring", "api", ADMIN), ("monitoring", "engine", ADMIN)}
FROM_GATEWAY = {("gateway", "api", API)}
# Without a gateway every pod of the cluster is a client.
FROM_ELSEWHERE = FROM_GATEWAY | {(who, "api", API) for who in ("client", "monitoring", "names")}

Flow = tuple[str, str, int]


def peers_of(objects: Sequence[Object]) -> dict[str, Peer]:
    return {
        "api": pod(objects, "Deployment", "quire-api"),
        "engine": pod(objects, "Deployment", "quire-engine"),
        "redis": pod(objects, "StatefulSet", "quire-redis"),
        "other redis": pod(objects, "StatefulSet", "quire-redis"),
        "client": stranger("default"),
        "monitoring": stranger("monitoring"),
        "names": stranger("kube-system"),
        "gateway": stranger("proxies", gateway=True),
    }


def flows(objects: Sequence[Object]) -> set[Flow]:
    """What gets through, of all that has one of our pods at an end."""
    peers = peers_of(objects)
    return {
        (source, target, port)
        for source in peers
        for target in peers
        for port in (API, ADMIN, REDIS, BUS, NAMES)
        if source != target
        and (peers[source].ours or peers[target].ours)
        and allowed(objects, peers[source], peers[target], port)
    }


def with_twins(flow: Flow) -> set[Flow]:
    """The same with any of the servers of Redis, which are two here."""
    source, target, port = flow
    if "other redis" in flow:
        return {flow, (target, source, port)}
    return {
        tuple(other if each == "redis" else each for each in flow)  # type: ignore[misc]
        for other in ("redis", "other redis")
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_must_talk_can_and_nothing_else(overlay: str) -> None:
    clients = FROM_GATEWAY if overlay == "gateway" else FROM_ELSEWHERE
    expected = OURS | SCRAPES | clients | (PEERS if overlay == "redis-cluster" else set())
    assert flows(render(overlay)) == {each for flow in expected for each in with_twins(flow)}


@pytest.mark.parametrize("name", ["nothing", "names", "api", "engine", "redis", "metrics"])
def test_each_policy_matters(name: str) -> None:
    objects = render("cpu")
    before = flows(objects)
    objects.remove(get(objects, "NetworkPolicy", name))
    assert flows(objects) != before
