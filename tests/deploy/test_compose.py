"""compose.yaml: valid by the specification, and its services find each other and the program."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from fastapi.routing import APIRoute

from service.__main__ import app as command_line
from service.api import ROUTERS
from service.api.http.middleware import AllowedHosts
from service.errors import Forbidden
from service.http.drain import CLOSE_TIMEOUT
from service.http.exposure import keyless_hosts
from service.settings import Settings, load_settings
from tests.deploy.manifests import DEPLOY, ROOT

Service = dict[str, Any]
ENV_FILE = dict(
    line.split("=", 1)
    for line in (DEPLOY / ".env").read_text().splitlines()
    if line and not line.startswith("#")
)


def interpolated(node: Any) -> Any:
    """Variables as an empty shell leaves them: their defaults."""
    if isinstance(node, dict):
        return {key: interpolated(value) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolated(each) for each in node]
    if isinstance(node, str):
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: ENV_FILE.get(m[1], m[2]), node)
    return node


@cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    found: dict[str, Any] = interpolated(document)
    return found


def compose() -> dict[str, Any]:
    return deepcopy(_document())


def services() -> dict[str, Service]:
    found: dict[str, Service] = compose()["services"]
    return found


OURS = [name for name, each in services().items() if "build" in each]


def settings_of(name: str) -> Settings:
    """The image's own address, and what compose adds."""
    return load_settings({}, environ={"QUIRE_HOST": "0.0.0.0"} | services()[name]["environment"])


def test_it_is_valid() -> None:
    parsed = PyCompose.from_json(json.dumps(compose()))
    parsed.validate()
    assert set(parsed.service_names()) == set(services())


@pytest.mark.parametrize(
    "change",
    [
        {"helthcheck": {}},
        {"ports": ["eighty"]},
        {"depends_on": {"api": {"condition": "up"}}},
        {"build": 3},
    ],
)
def test_what_is_not_valid_is_seen(change: dict[str, Any]) -> None:
    broken = compose()
    broken["services"]["redis"] |= change
    with pytest.raises((ValueError, TypeError)):
        PyCompose.from_json(json.dumps(broken)).validate()


def test_a_plain_up_is_everything_on_a_cpu() -> None:
    chosen = set(ENV_FILE["COMPOSE_PROFILES"].split(","))
    known = {profile for each in services().values() for profile in each.get("profiles", [])}
    assert known == {"cpu", "gpu", "second-model", "monitoring"}
    up = {
        name
        for name, each in services().items()
        if not each.get("profiles") or chosen & set(each["profiles"])
    }
    assert up == {"api", "engine", "redis", "prometheus", "grafana"}


@pytest.mark.parametrize("name", services())
def test_a_service_is_watched_bounded_and_hardened(name: str) -> None:
    service = services()[name]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["restart"] == "unless-stopped"
    ours = r"quire:(cpu|cuda)"
    theirs = r"docker\.io/[\w/-]+@sha256:[0-9a-f]{64}"
    assert re.fullmatch(f"{ours}|{theirs}", service["image"]), "pinned by its digest"
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), f"{port} is open to the network"


@pytest.mark.parametrize("name", services())
def test_what_a_service_names_is_there(name: str) -> None:
    service, document = services()[name], compose()
    for other, condition in service.get("depends_on", {}).items():
        assert "healthcheck" in document["services"][other]
        assert condition == {"condition": "service_healthy"}
        needed = set(document["services"][other].get("profiles", []))
        assert not needed or needed & set(service.get("profiles", [])), f"{other} may be off"
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
            assert volume.endswith(":ro"), volume
        else:
            assert source in document["volumes"], source
    assert set(service["networks"]) <= set(document["networks"])


def test_what_is_declared_is_used() -> None:
    document = compose()
    mounted = {
        volume.split(":")[0] for each in services().values() for volume in each.get("volumes", [])
    }
    assert set(document["volumes"]) <= mounted
    assert set(document["networks"]) == {
        n for each in services().values() for n in each["networks"]
    }
    assert document["networks"]["journal"] == {"internal": True}
    assert services()["redis"]["networks"] == ["journal"], "it asks for no password"
    assert "ports" not in services()["redis"]


@pytest.mark.parametrize("name", OURS)
def test_our_services_start_and_find_the_queue(name: str) -> None:
    service, settings = services()[name], settings_of(name)
    commands = {command.name or "" for command in command_line.registered_commands}
    assert service["command"][0] in commands
    match = re.fullmatch(r"redis://(\w+):6379/0", settings.queue)
    assert match
    assert match[1] in services()
    assert set(service["networks"]) == {"journal", "outside"}
    assert "/tmp" in service["tmpfs"][0]
    if service["command"] == ["api"]:
        assert settings.allow_anonymous, "it would refuse to start"
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace > settings.drain_timeout + 2 * CLOSE_TIMEOUT + 5


@pytest.mark.parametrize("name", OURS)
def test_our_ports_accept_the_names_that_are_used_and_no_others(name: str) -> None:
    """The ports are published on the loopback without keys: a browser there can be rebound."""
    check = keyless_hosts(settings_of(name))
    assert isinstance(check, AllowedHosts)
    for host in (*OURS, "127.0.0.1", "localhost", "172.18.0.5"):  # Prometheus scrapes addresses
        check({"headers": [(b"host", f"{host}:8001".encode())]})
    with pytest.raises(Forbidden):
        check({"headers": [(b"host", b"evil.example:8000")]})


@pytest.mark.parametrize("name", OURS)
def test_our_images_are_built_from_stages_that_exist(name: str) -> None:
    text = (ROOT / "Dockerfile").read_text()
    build = services()[name]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert re.search(rf"^FROM \S+ AS {build['target']}$", text, re.MULTILINE)
    assert services()[name]["image"] == f"quire:{build['target']}"
    for argument in build["args"]:
        assert re.search(rf"^ARG {argument}\b", text, re.MULTILINE), argument


@pytest.mark.parametrize("name", OURS)
def test_our_health_checks_ask_endpoints(name: str) -> None:
    program = services()[name]["healthcheck"]["test"][-1]
    port, path = re.findall(r"127\.0\.0\.1:(\d+)(/[\w/]+)", program)[0]
    assert int(port) == settings_of(name).admin_port
    assert path in {route.path for route in ROUTERS["health"].routes if isinstance(route, APIRoute)}
    compile(program, "health check", "exec")


def test_prometheus_scrapes_our_services() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    scraped = set()
    for job in config["scrape_configs"]:
        (lookup,) = job["dns_sd_configs"]
        assert lookup["type"] == "A"
        for name in lookup["names"]:
            assert lookup["port"] == settings_of(name).admin_port
            assert job["job_name"] == f"quire-{services()[name]['command'][0]}"
            assert set(services()[name]["networks"]) & set(services()["prometheus"]["networks"])
            scraped.add(name)
    assert scraped == set(OURS)


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((provisioning / "dashboards" / "quire.yaml").read_text())
    path = provider["providers"][0]["options"]["path"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in services()["grafana"]["volumes"])
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / mounts[path] / home.removeprefix(path + "/")).is_file()


def test_each_model_has_an_engine_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """API replicas serve them all."""
    assert settings_of("api").model == settings_of("engine").model
    monkeypatch.setitem(ENV_FILE, "MODEL_2", "second")
    _document.cache_clear()
    try:
        found = [settings_of(name).model for name in ("engine", "engine-second")]
        assert found == [(settings_of("api").model[0],), ("second",)]
        assert settings_of("api").model == (*found[0], *found[1])
    finally:
        _document.cache_clear()
