"""deploy/constraints.txt has a version of each dependency, and every install uses it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.manifests import DEPLOY, ROOT

LINES = [
    line
    for line in (DEPLOY / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in (line.split("==") for line in LINES)
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_dependency_has_a_version_within_its_range(requirement: Requirement) -> None:
    version = PINS.get(canonicalize_name(requirement.name))
    assert version is not None, "run `make constraints`, or add the version that was tested"
    assert requirement.specifier.contains(version)


def test_lines_are_plain_versions_named_once() -> None:
    """Local versions such as `+cpu` would decide which build of torch is installed."""
    assert len(PINS) == len(LINES)
    assert [line for line in LINES if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_what_pinned_packages_need_is_pinned() -> None:
    """An image would have what is newest on the day of its build, otherwise. Torch names CUDA's
    libraries with their versions.
    """
    missing = {
        f"{name} needs {needed}"
        for name in PINS
        for needed in needed_by(name)
        if canonicalize_name(needed.name) not in PINS and "==" not in str(needed.specifier)
    }
    assert missing == set()


def needed_by(name: str) -> Iterator[Requirement]:
    """Nothing if it is not installed here."""
    with suppress(PackageNotFoundError):
        for needed in map(Requirement, requires(name) or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                yield needed


def test_docker_make_and_ci_use_them() -> None:
    """CI runs `make`. Torch's CPU index has no other packages, so its version is an argument."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"ARG TORCH_VERSION={PINS[canonicalize_name('torch')]}\n" in dockerfile
    installs = re.findall(r"/opt/quire/bin/pip install --no-compile (.*?) \\\n", dockerfile)
    free = [line for line in installs if "--constraint /wheels/constraints.txt" not in line]
    assert free == ['--index-url "${TORCH_CPU_INDEX}" "torch==${TORCH_VERSION}"']
    assert len(installs) == 4
    makefile = (ROOT / "Makefile").read_text()
    assert "CONSTRAINTS ?= deploy/constraints.txt\n" in makefile
    assert len(re.findall(r"^\t\$\(INSTALL\) --editable", makefile, re.MULTILINE)) == 2
    assert "$(PIP) install --editable" not in makefile


def test_every_deployment_runs_the_same_redis() -> None:
    """compose.yaml and the base of the overlays name one digest."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["redis"]["image"]
    base = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "kustomization.yaml").read_text())
    (redis,) = (image for image in base["images"] if image["name"] == "redis")
    assert compose == f"{redis['newName']}@{redis['digest']}"


def test_actions_of_ci_are_pinned_by_commit() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())["jobs"]
    used = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action)] == []


def test_ci_tests_kernels_with_the_oldest_triton_and_the_pinned_one() -> None:
    """The oldest is what `make test-triton` takes by default."""
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())["jobs"]["triton"]
    (oldest,) = re.findall(r"^TRITONS \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pinned = str(PINS[canonicalize_name("triton")])
    assert {*job["strategy"]["matrix"]["triton"]} == {oldest, pinned}
    for requirement in REQUIREMENTS:
        if requirement.name == "triton":
            assert f">={oldest.rpartition('.')[0]}" in str(requirement.specifier)
    assert "make test-triton\n" in (ROOT / ".ci/run").read_text()
