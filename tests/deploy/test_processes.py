"""The program in the environments of the manifests: it starts, and its ports and probes answer.

API and engine run beside the deployed Redis with what their containers would be given. Only what
this machine has otherwise is another: the model's file, free ports, the loopback, one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, free_port
from tests.deploy.conftest import PASSWORD, DeployedRedis
from tests.deploy.manifests import DEPLOY, containers, environment, get, pod_of, render
from tests.deploy.promql import known_series
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow

PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@dataclass(frozen=True, kw_only=True)
class Container:
    """A container of the cpu overlay, run as a process. `ports` are this machine's, by name."""

    role: str
    ports: dict[str, int]
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, port: str, path: str) -> tuple[int, str]:
        try:
            url = f"http://127.0.0.1:{self.ports[port]}{path}"
            with urllib.request.urlopen(url, timeout=PATIENCE) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait_until(
        self, port: str, path: str, status: int, *, seconds: float = 4 * PATIENCE
    ) -> None:
        ends = time.monotonic() + seconds
        while (got := self.get(port, path)[0]) != status:
            assert time.monotonic() < ends, f"{self.role} {path}: {got}\n{self.log.read_text()}"
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)


def start(role: str, redis: DeployedRedis, model: Path, log: Path) -> Container:
    objects = render("cpu")
    (container,) = containers(get(objects, "Deployment", f"quire-{role}"), with_init=False)
    values = environment(objects, container) | {"REDIS_PASSWORD": PASSWORD, "QUIRE_THREADS": "1"}
    queue = (values["QUIRE_QUEUE"] or "").replace("$(REDIS_PASSWORD)", PASSWORD)
    ports = {port["name"]: free_port() for port in container["ports"]}
    here = {
        "QUIRE_QUEUE": queue.replace("quire-redis:6379", f"127.0.0.1:{redis.port}"),
        "QUIRE_MODEL": str(model),
        "QUIRE_HOST": "127.0.0.1",
        "QUIRE_PORT": str(ports.get("http", 0)),
        "QUIRE_ADMIN_PORT": str(ports["admin"]),
    }
    # PATH and HOME are the image's business; nothing else comes from this machine.
    machine = {name: os.environ[name] for name in ("PATH", "HOME")}
    given = {name: value for name, value in values.items() if value is not None}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", *container["args"]],
            cwd=ROOT, env=machine | given | here, stdout=output, stderr=output,
        )  # fmt: skip
    return Container(role=role, ports=ports, process=process, log=log)


@contextlib.contextmanager
def started(
    redis: DeployedRedis, tiny_model: TinyModel, folder: Path
) -> Iterator[dict[str, Container]]:
    """An API replica and an engine that are ready, by their role."""
    model = tiny_model.write_folder(folder / "tiny")
    made = {role: start(role, redis, model, folder / f"{role}.log") for role in ("api", "engine")}
    try:
        for container in made.values():
            container.wait_until("admin", "/health/ready", 200)
        yield made
    finally:
        for container in made.values():
            container.process.kill()
            container.process.wait()


@pytest.fixture(scope="module")
def pods(
    deployed_redis: DeployedRedis, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Container]]:
    with started(deployed_redis, tiny_model, tmp_path_factory.mktemp("pods")) as pods:
        yield pods


@pytest.mark.parametrize("role", ["api", "engine"])
def test_probes_and_ports_answer(pods: dict[str, Container], role: str) -> None:
    (container,) = containers(get(render("cpu"), "Deployment", f"quire-{role}"), with_init=False)
    for probe in PROBES:
        ask = container[probe]["httpGet"]
        assert pods[role].get(ask["port"], ask["path"])[0] == 200, probe
    status, text = pods[role].get("admin", "/metrics")
    assert status == 200
    assert re.search(r'^quire_requests_lost_total\{model="[^"]+"\} 0\.0$', text, re.MULTILINE)
    exposed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    families = {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        for name in known_series()
    }
    assert families <= exposed


def complete(api: Container) -> int:
    """Asks for four tokens; returns how many came."""
    models = json.loads(api.get("http", "/v1/models")[1])["data"]
    body = {"model": models[0]["id"], "prompt": "the quick", "max_tokens": 4, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{api.ports['http']}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        return int(json.load(reply)["usage"]["completion_tokens"])


def test_the_api_serves_on_the_port_of_its_service(pods: dict[str, Container]) -> None:
    assert complete(pods["api"]) == 4
    assert pods["api"].get("http", "/metrics")[0] == 404, "metrics are the operator's alone"


def test_the_scalers_series_are_exposed_by_the_api(pods: dict[str, Container]) -> None:
    text = pods["api"].get("admin", "/metrics")[1]
    for name in ("quire_queue_requests", "quire_queue_running"):
        assert f"\n{name} " in text
    for name in ("tokens", "requests", "running"):
        assert f'\nquire_model_queue_{name}{{model="' in text


WITHOUT_DATA = {"Refused", "Wasted tokens", "Queue events"}  # nothing of the kind happened


@pytest.fixture
def prometheus(pods: dict[str, Container], tmp_path: Path) -> Iterator[str]:
    """A real Prometheus with the deployed configuration, about where it looks and how often."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "rules.yaml")]
    for job in config["scrape_configs"]:
        admin = pods[job["job_name"].removeprefix("quire-")].ports["admin"]
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{admin}"]}]
    path = tmp_path / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    command += [f"--web.listen-address={address}", "--log.level=error"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        yield f"http://{address}/api/v1"
        process.terminate()


def ask_prometheus(url: str, path: str, **parameters: str) -> dict[str, Any]:
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/{path}?{query}", timeout=PATIENCE) as reply:
        answer: dict[str, Any] = json.load(reply)
    assert answer["status"] == "success"
    data: dict[str, Any] = answer["data"]
    return data


def test_every_panel_of_the_dashboard_shows_what_the_pods_tell(
    pods: dict[str, Container], prometheus: str
) -> None:
    def work_seen() -> bool:
        """Two scrapes of each pod with work between them: then every rate has a value."""
        complete(pods["api"])
        query = "rate(quire_steps_total[10s]) > 0 and on () rate(quire_http_responses_total[10s])"
        with contextlib.suppress(OSError):
            return bool(ask_prometheus(prometheus, "query", query=query)["result"])
        return False

    ends = time.monotonic() + 3 * PATIENCE
    while not work_seen():
        assert time.monotonic() < ends, "Prometheus sees no work"
        time.sleep(0.3)
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "quire.json").read_text())
    empty = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "30s").replace("$__range", "1m")
            found = ask_prometheus(prometheus, "query", query=query.replace("$instance", ".*"))
            if not found["result"]:
                empty.add(panel["title"])
    assert empty <= WITHOUT_DATA
    groups = ask_prometheus(prometheus, "rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 15
    assert {rule["health"] for rule in rules} == {"ok"}
    # Nothing is wrong here, but this machine may be slow.
    alerts = [rule for rule in rules if "seconds_bucket" not in rule["query"]]
    assert {rule["state"] for rule in alerts} == {"inactive"}, alerts


def test_pods_end_within_their_grace(
    deployed_redis: DeployedRedis, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Pods of its own: test processes take over tests in any order."""
    with started(deployed_redis, tiny_model, tmp_path) as pods:
        for role in ("engine", "api"):
            workload = get(render("cpu"), "Deployment", f"quire-{role}")
            grace = pod_of(workload)["terminationGracePeriodSeconds"]
            pods[role].process.send_signal(signal.SIGTERM)
            assert pods[role].process.wait(timeout=max(grace, PATIENCE)) == 0, pods[
                role
            ].log.read_text()
