"""A picture of the Grafana dashboard from real data, without Grafana.

    python -m loadtest.dashboard --seconds 120 --out .github/dashboard.png

It starts two API replicas, two engines with the default model and a Redis, lets a real Prometheus
scrape them with the deployed configuration while Locust's users ask, kills an engine on the way,
puts each panel's own queries to Prometheus, and draws what it answers. Chromium makes a PNG of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from loadtest.bench.servers import find_program, free_port
from loadtest.load import ROOT, Load, locust_command
from loadtest.panels import WIDTH, Time, draw
from loadtest.shapes import Shape
from loadtest.traffic import Workload
from model.checkpoint.fetch import default_cache, resolve
from tests.cluster.balancer import Balancer
from tests.cluster.cluster import Cluster, Scale
from tests.cluster.processes import Replica, wait_until

DEPLOY = ROOT / "deploy"
SCRAPE = 2  # seconds
STEP = 2.0  # seconds between points
RATE = "15s"  # what Grafana would put for $__rate_interval
USERS = 10
LAST_WORDS = 4000  # characters of the log of what ended by itself
CAPTION = "Prometheus' answers to the dashboard's queries, drawn by loadtest/dashboard.py"


def prometheus_config(targets: Path) -> dict[str, Any]:
    """The deployed one, about where it looks and how often; targets come and go as files."""
    text = (DEPLOY / "prometheus" / "prometheus.yaml").read_text()
    config: dict[str, Any] = yaml.safe_load(text)
    config["global"] = {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "rules.yaml")]
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        files = [str(targets / f"{job['job_name']}.json")]
        job["file_sd_configs"] = [{"files": files, "refresh_interval": "1s"}]
    return config


def tell_targets(targets: Path, cluster: Cluster) -> None:
    """The replicas that are there now, by name."""
    for job, replicas in (("quire-api", cluster.apis), ("quire-engine", cluster.engines)):
        entries = [
            {"targets": [_address(each)], "labels": {"instance": each.log.stem}}
            for each in replicas
            if each.is_up and each.ready()
        ]
        path = targets / f"{job}.json"
        path.with_suffix(".tmp").write_text(json.dumps(entries))
        path.with_suffix(".tmp").rename(path)


def _address(replica: Replica) -> str:
    host, port = replica.address("metrics")
    return f"{host}:{port}"


@contextmanager
def prometheus(folder: Path, targets: Path) -> Iterator[str]:
    """A real one; gives the address of its HTTP API."""
    config = folder / "prometheus.yaml"
    config.write_text(yaml.safe_dump(prometheus_config(targets)))
    address = f"127.0.0.1:{free_port()}"
    command = [find_program("prometheus") or "prometheus", f"--config.file={config}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, "--log.level=warn"], stdout=log, stderr=log)
    try:
        yield f"http://{address}/api/v1"
    finally:
        process.terminate()
        process.wait(20)


Series = tuple[Mapping[str, str], Sequence[tuple[float, float]]]


def ask_range(url: str, query: str, *, begin: float, end: float) -> list[Series]:
    """The series of a query over a time."""
    fields = {"query": query, "start": begin, "end": end, "step": STEP}
    address = f"{url}/query_range?{urllib.parse.urlencode(fields)}"
    with urllib.request.urlopen(address, timeout=30) as reply:  # noqa: S310 - http on the loopback
        result = json.load(reply)["data"]["result"]
    return [
        (each["metric"], [(float(at), float(value)) for at, value in each["values"]])
        for each in result
    ]


def expand(query: str, dashboard: Mapping[str, Any], *, seconds: float) -> str:
    """A panel's query with Grafana's variables filled in; our own stand for everything."""
    query = query.replace("$__rate_interval", RATE).replace("$__range", f"{seconds:.0f}s")
    for variable in dashboard.get("templating", {}).get("list", ()):
        query = query.replace(f"${variable['name']}", ".*")
    return query


async def run_load(cluster: Cluster, targets: Path, folder: Path, *, seconds: int) -> None:
    """Users in a spike; in its middle an engine is killed and replaced."""
    load = Load(users=USERS, seconds=seconds, shape=Shape.SPIKE, workload=Workload.MIXED)
    async with Balancer(cluster.addresses) as balancer:
        command = locust_command(balancer.url, load, model=cluster.model.name, out=folder / "load")
        with (folder / "locust.log").open("wb") as log:
            locust = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, stdout=log, stderr=log
            )
        await asyncio.sleep(seconds / 2)
        victim = cluster.engines[0]
        victim.kill()
        new = cluster.replace(victim)
        await asyncio.to_thread(new.wait_until_ready)
        tell_targets(targets, cluster)
        code = await locust.wait()
    fallen = [each.log for each in (*cluster.engines, *cluster.apis) if not each.state]
    if fallen:
        raise RuntimeError(f"ended by itself: {fallen[0].read_text()[-LAST_WORDS:]}")
    print(f"Locust ended with {code}: {'no' if code == 0 else 'some'} stream failed")


def screenshot(svg: str, out: Path, *, height: int) -> None:
    """A PNG of it, by Chromium."""
    with tempfile.TemporaryDirectory() as name:
        page = Path(name) / "page.html"
        page.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{svg}')
        subprocess.run(
            [
                find_program("chromium") or "chromium",
                *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--window-size={WIDTH},{height}", f"--screenshot={out.absolute()}"),
                f"--user-data-dir={name}/profile",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )


def picture(url: str, *, begin: float, end: float) -> tuple[str, int]:
    """The SVG and its height."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "quire.json").read_text())

    def ask(query: str) -> list[Series]:
        return ask_range(url, expand(query, dashboard, seconds=end - begin), begin=begin, end=end)

    return draw(dashboard, ask, time=Time(begin, end), caption=CAPTION)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Draw the dashboard from a real run.")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--out", type=Path, default=ROOT / ".github" / "dashboard.png")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="quire-dashboard-") as name:
        folder = targets = Path(name)
        cluster = Cluster(
            folder / "cluster",
            resolve("", cache=default_cache()),
            forge=None,
            scale=Scale(lease=3.0, grace=30.0),
            engine_flags={"threads": 1, "kv-memory": "64MiB"},
        )
        try:
            cluster.start()
            tell_targets(targets, cluster)
            with prometheus(folder, targets) as url:
                wait_until(lambda: _is_scraping(url), "Prometheus sees all replicas", seconds=60)
                begin = time.time()
                asyncio.run(run_load(cluster, targets, folder, seconds=options.seconds))
                svg, height = picture(url, begin=begin, end=time.time())
        finally:
            cluster.close()
    screenshot(svg, options.out, height=height)
    print(options.out)
    return 0


def _is_scraping(url: str) -> bool:
    now = time.time()
    try:
        found = ask_range(url, "sum(up)", begin=now - STEP, end=now)
    except OSError:
        return False
    return bool(found) and found[0][1][-1][1] == 4  # two of each


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
