"""The operator's guide and CI's workflow name what exists: alerts, settings, series, files."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import yaml

from model.config import ModelConfig
from model.kvcache import bytes_per_block
from model.runners import RunnerOptions
from model.runners.choose import choose_sizes
from service.observability.metrics import Metrics
from service.setting_rows import setting_rows
from tests.deploy.manifests import DEPLOY, ROOT, get, render
from tests.deploy.promql import known_series

GUIDE = (DEPLOY / "README.md").read_text()
WORKFLOW_TEXT = (ROOT / ".github" / "workflows" / "ci.yaml").read_text()
WORKFLOW = yaml.load(WORKFLOW_TEXT, Loader=yaml.BaseLoader)  # `on` is a word there


def test_every_alert_has_its_paragraph() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    assert re.findall(r"^### (\w+)$", GUIDE, re.MULTILINE) == alerts


def test_every_setting_it_names_is_one() -> None:
    known = {row.variable for row in setting_rows()}
    named = set(re.findall(r"QUIRE_[A-Z_]+[A-Z]", GUIDE))
    assert len(named) >= 12
    assert named <= known


def test_the_defaults_it_states_are_those() -> None:
    defaults = {row.variable: row.default for row in setting_rows()}
    stated = dict(re.findall(r"^\| `(QUIRE_\w+)` \| ([\d.,]+)(?: s)? \|", GUIDE, re.MULTILINE))
    assert len(stated) >= 5
    for name, value in stated.items():
        assert float(defaults[name]) == float(value.replace(",", "")), name


@pytest.mark.parametrize("name", ["max_batch_tokens", "max_sequences"])
def test_the_sizes_it_states_are_those_that_are_chosen(name: str) -> None:
    """They depend on the runner, and the setting's help says so as well."""
    wanted: dict[str, Any] = {"kv_memory": None, "max_batch_tokens": None, "max_sequences": None}
    cpu, gpu = (
        getattr(choose_sizes(RunnerOptions(), runner=runner, memory_share=0.9, **wanted), name)
        for runner in ("native", "cuda")
    )
    assert f"| `QUIRE_{name.upper()}` | {cpu}; GPU {gpu} |" in GUIDE
    help_text = next(row.help for row in setting_rows() if row.name == name)
    assert help_text.endswith(f"default: {cpu}, on a GPU {gpu}.")


def test_every_series_it_names_is_one() -> None:
    named = set(re.findall(r"`(quire_\w+|gen_ai_\w+)`", GUIDE))
    assert named
    assert named <= set(known_series())


def test_the_pickers_series_are_exported() -> None:
    """With the labels that the table of the section "Gateway" gives."""
    metrics = Metrics(vllm_names=True)
    metrics.of_model("tiny").has_cache(block_size=16, num_blocks=100)
    families = {family.name: family for family in metrics.registry.collect()}
    rows = re.findall(r"^\|[^|]*\| `(vllm:\w+)` \|(.*)\|$", GUIDE, re.MULTILINE)
    assert len(rows) == 4
    for name, labels in rows:
        (sample,) = families[name].samples
        assert sample.labels.keys() == {"model_name", *re.findall(r"`(\w+)`", labels)}


@pytest.mark.slow
def test_the_charts_values_configure_redis_as_ours() -> None:
    """All of redis.conf but what a chart sets itself: folder, port, protected mode, keep-alive."""
    values = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[0])
    lines = (DEPLOY / "redis" / "redis.conf").read_text().splitlines()
    ours = {line for line in lines if line and not line.startswith("#")}
    theirs = set(values["commonConfiguration"].splitlines())
    assert theirs <= ours
    assert {line.split()[0] for line in ours - theirs} == {
        "dir", "port", "protected-mode", "tcp-keepalive",
    }  # fmt: skip
    redis = get(render("cpu"), "StatefulSet", "quire-redis")
    (server,) = redis["spec"]["template"]["spec"]["containers"]
    assert values["replica"]["resources"] == server["resources"]


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"\bdeploy/[\w./-]+\w", GUIDE))
    assert len(named) >= 8
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_its_links_lead_somewhere() -> None:
    headings = {
        heading.lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", GUIDE, re.MULTILINE)
    }
    links = set(re.findall(r"\]\(#([\w-]+)\)", GUIDE))
    assert links
    assert links <= headings


def test_the_secret_it_makes_is_the_one_that_pods_read() -> None:
    name, key = re.findall(r"create secret generic ([\w-]+) --from-literal=(\w+)=", GUIDE)[0]
    pod = get(render("cpu"), "Deployment", "quire-api")["spec"]["template"]["spec"]
    reference = pod["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": name, "key": key}
    assert get(render("cpu"), "Service", "quire-api")["spec"]["ports"][0]["port"] == 80


@pytest.mark.parametrize(
    ("model", "layers", "kv_heads", "head_dim"),
    [
        ("SmolLM2-135M", 30, 3, 64),
        ("Qwen3-0.6B", 28, 8, 128),
        ("Llama-3.1-8B", 32, 8, 128),
        ("Qwen3-4B", 36, 8, 128),
    ],
)
def test_sizes_are_computed_as_the_engine_does(
    model: str, layers: int, kv_heads: int, head_dim: int
) -> None:
    config = ModelConfig(
        family="llama", vocab_size=8, hidden_size=8, num_layers=layers, num_heads=kv_heads,
        num_kv_heads=kv_heads, head_dim=head_dim, intermediate_size=8, max_model_len=8,
    )  # fmt: skip
    size = bytes_per_block(config, 1, dtype=torch.bfloat16)
    (row,) = re.findall(rf"^\| {model} \| ([\d,]+) \| ([\d,]+) \|", GUIDE, re.MULTILINE)
    per_token, per_gib = (int(cell.replace(",", "")) for cell in row)
    assert per_token == size
    assert per_gib == pytest.approx(2**30 / size, rel=0.002)


def test_ci_calls_what_a_contributor_calls() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    called = [word for step in steps for word in re.findall(r"^make (\w+)$", step.get("run", ""))]
    assert called == ["test"]
    assert set(called) <= targets
    built = re.findall(r"docker build --target (\w+)", WORKFLOW_TEXT)
    assert all(
        re.search(rf" AS {name}$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for name in built
    )
    assert built


def test_ci_publishes_nothing() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not re.search(r"docker push|--push|secrets\.|login|twine|upload", WORKFLOW_TEXT)
    for job in WORKFLOW["jobs"].values():
        assert "timeout-minutes" in job
        assert "permissions" not in job
