"""API keys in a deployment: the component mounts them, and compose takes them from a folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.settings import load_settings
from tests.deploy.manifests import DEPLOY, containers, get, pod_of


@pytest.fixture
def api(tmp_path: Path) -> dict[str, object]:
    """The API's Deployment of an overlay as an operator would write it."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    kubernetes = os.path.relpath(DEPLOY / "kubernetes", tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{kubernetes}/overlays/cpu]\ncomponents: [{kubernetes}/components/keys]\n"
    )
    run = subprocess.run(
        [kubectl, "kustomize", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    objects = list(yaml.load_all(run.stdout, Loader=yaml.CSafeLoader))
    return get(objects, "Deployment", "quire-api")


def test_the_component_mounts_the_secret_where_the_setting_looks(api: dict[str, object]) -> None:
    (container,) = containers(api)
    plain = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    settings = load_settings({}, environ={"QUIRE_HOST": "0.0.0.0"} | plain)
    assert not settings.allow_anonymous
    assert settings.keys_file is not None
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "keys"]
    (volume,) = [v for v in pod_of(api)["volumes"] if v["name"] == "keys"]
    assert Path(mount["mountPath"]) == settings.keys_file.parent
    assert mount["readOnly"] is True
    assert "subPath" not in mount, "a file mounted alone never changes"
    text = (DEPLOY / "kubernetes" / "components" / "keys" / "kustomization.yaml").read_text()
    made = re.search(r"create secret generic ([\w-]+) --from-file=([\w.]+)", text)
    assert made is not None
    assert made.groups() == (volume["secret"]["secretName"], settings.keys_file.name)


def test_compose_reads_keys_from_a_folder_that_is_not_committed() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["api"]
    assert "./keys:/etc/quire/keys:ro" in service["volumes"]
    assert service["environment"]["QUIRE_KEYS_FILE"] == "${KEYS_FILE:-}"
    assert load_settings({}, environ={"QUIRE_KEYS_FILE": ""}).keys_file is None
    assert (DEPLOY / "keys" / ".gitignore").read_text().splitlines()[1:] == ["*", "!.gitignore"]
