"""Prometheus' own tools over its configuration, the alerts, and what the program exposes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.engine.observer import StepReport
from service.messages import End, FinishReason, ModelCard
from service.observability.metrics import Metrics
from service.queues.contract import QueueDepth
from tests.deploy.manifests import DEPLOY

FOLDER = DEPLOY / "prometheus"
ALERTS = [
    rule["alert"]
    for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
    ),
]


def promtool(*arguments: str, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["promtool", *arguments], input=given, capture_output=True, check=False, timeout=60
    )


def test_the_configuration_is_one() -> None:
    done = promtool("check", "config", str(FOLDER / "prometheus.yaml"))
    assert done.returncode == 0, done.stderr.decode()


def test_alerts_fire_when_they_should_and_only_then() -> None:
    done = promtool("test", "rules", str(FOLDER / "rules_test.yaml"))
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()


@pytest.mark.slow
@pytest.mark.parametrize("expression", ["vector(1)", "vector(1) > 1"], ids=["always", "never"])
def test_each_alert_is_tested_both_ways(expression: str, tmp_path: Path) -> None:
    """The rules' own tests must miss each alert that never fires, and see each that always does."""
    rules = yaml.safe_load((FOLDER / "rules.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = expression
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(FOLDER / "rules_test.yaml", tmp_path)
    done = promtool("test", "rules", str(tmp_path / "rules_test.yaml"))
    assert done.returncode != 0
    complaints = (done.stdout + done.stderr).decode()
    assert [alert for alert in ALERTS if alert not in complaints] == []


def fed_metrics() -> Metrics:
    """Each labelled series has a sample: the linter sees only what is exposed."""
    metrics = Metrics()
    metrics.call_answered(200)
    metrics.call_refused("full")
    engine = metrics.of_model("tiny")
    engine.ended(End(count=1, reason=FinishReason.STOP), 0.5)
    engine.wasted(3, "cancelled")
    metrics.serves(
        ModelCard(id="tiny", max_model_len=8, vocab_size=8, numeric_class="class-1", created=0)
    )
    metrics.queue_read(
        QueueDepth(queued_requests=1, queued_tokens=9, running_requests=2), {"tiny": 3}
    )
    fields: dict[str, Any] = dict.fromkeys(StepReport.__dataclass_fields__, 1)
    engine.stepped(StepReport(**fields | {"preempted": ("r.0",)}))
    return metrics


def test_the_exposition_passes_the_linter_without_a_word() -> None:
    done = promtool("check", "metrics", given=fed_metrics().render())
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_linter_would_say_something() -> None:
    done = promtool("check", "metrics", given=b"# TYPE quire_steps counter\nquire_steps 1\n")
    assert done.returncode != 0
