"""The Dockerfile: clean by hadolint, and true to the repository and the program it packs.

Nothing is built here. That the stages build and the image starts is tried where there is a builder;
CI builds it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from service.__main__ import app as command_line
from service.settings import load_settings
from tests.deploy.manifests import ROOT
from tests.support.waiting import PATIENCE

DOCKERFILE = ROOT / "Dockerfile"
COMPILERS = {"g++", "gcc", "clang", "build-essential", "make", "cmake"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(word, rest) for word, rest in pairs]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Name -> its instructions, those of the stages that it is made from first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions(DOCKERFILE.read_text()):
        if word == "FROM":
            parent, _, name = rest.split()
            found[name] = list(found.get(parent, []))
        elif name:
            found[name].append((word, rest))
    return found


def of(stage: str, word: str) -> list[str]:
    return [rest for each, rest in stages()[stage] if each == word]


def environment(stage: str) -> dict[str, str]:
    pairs = (pair.partition("=") for rest in of(stage, "ENV") for pair in shlex.split(rest))
    return {name: value for name, _, value in pairs}


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "it comes with the test dependencies"
    return subprocess.run([program, str(path)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_hadolint_has_nothing_to_say() -> None:
    done = hadolint(DOCKERFILE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    text = DOCKERFILE.read_text()
    (tmp_path / "Dockerfile").write_text(text.replace("# hadolint ignore=DL3008\n", ""))
    assert "DL3008" in hadolint(tmp_path / "Dockerfile").stdout


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    dropped = [rule for rule in rules if rule and rule[0] not in "#!" and rule != "*"]
    assert "*" in rules, "everything that is not named stays here: keys, caches, .git"
    copied = set()
    for rest in (rest for stage in stages() for rest in of(stage, "COPY")):
        *sources, _ = rest.split()
        if not rest.startswith("--from="):
            copied |= {source.removeprefix("./") for source in sources}
    assert copied == kept
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch(source, rule) for rule in dropped), source


def test_what_stages_copy_from_each_other_is_made_there() -> None:
    for name in stages():
        for rest in of(name, "COPY"):
            match = re.match(r"--from=(\S+) (?:--chown=10001:10001 )?(\S+) (\S+)$", rest)
            if match:
                origin, source, _ = match.groups()
                made = " ".join(rest for word, rest in stages()[origin] if word == "RUN")
                assert source in made, f"{name}: {origin} makes no {source}"


def test_the_base_image_is_pinned() -> None:
    """By digest; its version stands beside it for the reader. All stages come from it."""
    text = DOCKERFILE.read_text()
    pinned = r"^ARG BASE_IMAGE=docker\.io/library/python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$"
    assert re.search(pinned, text, re.MULTILINE)
    parents = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert {parent for parent in parents if parent not in stages()} == {"${BASE_IMAGE}"}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_target_runs_as_nobody_and_starts_the_program(target: str) -> None:
    assert of(target, "USER") == ["10001:10001"]
    assert stages()[target][-1] == ("USER", "10001:10001"), "nothing after it runs as root"
    commands = {command.name or "" for command in command_line.registered_commands}
    assert json.loads(of(target, "ENTRYPOINT")[-1]) == ["quire"]
    assert json.loads(of(target, "CMD")[-1])[0] in commands
    assert 'quire = "service.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    assert environment(target)["PATH"].startswith("/opt/quire/bin:")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_variables_are_settings(target: str) -> None:
    values = environment(target) | {"QUIRE_MODEL": "smollm2-135m-instruct"}
    settings = load_settings({}, environ=values)
    assert {str(settings.port), str(settings.admin_port)} == set(of(target, "EXPOSE")[-1].split())
    assert not settings.is_loopback


def test_compiled_kernels_are_kept_on_a_volume_of_the_image() -> None:
    """Which its user may write, as the folder has it before the volume is declared."""
    folder = environment("cuda")["TRITON_CACHE_DIR"]
    assert of("cuda", "VOLUME") == [folder]
    assert f"install -d -o 10001 -g 10001 {folder}" in of("cuda", "RUN")[-1]
    assert not of("cpu", "VOLUME")


def test_the_last_stage_has_no_compiler() -> None:
    assert next(reversed(stages())) == "cpu", "what a build without --target makes"
    words = {word for rest in of("cpu", "RUN") for word in shlex.split(rest)}
    assert not words & COMPILERS
    words = {word for rest in of("cuda", "RUN") for word in shlex.split(rest)}
    assert words & COMPILERS == {"gcc"}, "Triton's"


def test_arguments_are_named_in_the_stage_that_uses_them() -> None:
    """Builders differ in whether a stage sees the arguments of the one it is made from."""
    text = DOCKERFILE.read_text()
    bodies = re.split(r"^FROM .*$", text, flags=re.MULTILINE)
    declared = set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
    assert declared >= {"BASE_IMAGE", "MODEL", "TORCH_VERSION"}
    for body in bodies[1:]:
        own = set(re.findall(r"^ARG (\w+)", body, re.MULTILINE))
        assert set(re.findall(r"\$\{(\w+)\}", body)) & declared <= own


def test_torch_is_of_the_range_that_was_tried() -> None:
    (version,) = re.findall(r"^ARG TORCH_VERSION=(\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    low, high = re.findall(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())[0]

    def key(text: str) -> list[int]:
        return [int(part) for part in text.split(".")]

    assert key(low) <= key(version) < key(high)


@pytest.mark.slow
def test_the_health_check_asks_an_endpoint(tmp_path: Path) -> None:
    """Its own program, run against a server that answers, one that refuses, and none."""
    (check,) = of("cpu", "HEALTHCHECK")
    command = json.loads(check.split(" CMD ", 1)[1])
    assert command[0] == "python3"
    assert "/health/live" in command[2]
    server = (
        "import http.server, sys\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        assert self.path == '/health/live'\n"
        "        self.send_response(int(sys.argv[1])); self.end_headers()\n"
        "s = http.server.HTTPServer(('127.0.0.1', 0), H)\n"
        "print(s.server_port, flush=True); s.handle_request()\n"
    )

    def outcome(port: str) -> int:
        run = subprocess.run(
            [sys.executable, *command[1:]],
            env={"QUIRE_ADMIN_PORT": port}, capture_output=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        return run.returncode

    for status, healthy in (("200", True), ("503", False)):
        with subprocess.Popen(
            [sys.executable, "-c", server, status],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert (outcome(port) == 0) == healthy
            process.wait(timeout=PATIENCE)
    assert outcome(port) != 0, "nobody listens there any more"
