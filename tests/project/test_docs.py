"""The documentation is held to the code: generated tables are current, files and commands that it
names exist, and its examples run against a real server.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from model.checkpoint.gguf_header import STORAGE
from model.checkpoint.gguf_vocabulary import PRE_TOKENIZERS
from model.families import FAMILIES
from service.__main__ import app
from tests.conftest import free_port, wait_until_ready
from tests.project.reference import TABLES, regenerated
from tests.support.tiny_model import TinyModel
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "tests" / "README.md",
    ROOT / "deploy" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
DOCUMENTATION = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_generated_tables_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == regenerated(text), "run `make docs`"


def test_each_reference_has_a_page() -> None:
    assert set(re.findall(r"<!-- generated: (\w+) -->", DOCUMENTATION)) == set(TABLES)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_models_that_are_promised_are_those_that_load() -> None:
    stated = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", README, re.MULTILINE))
    types = stated["GGUF tensor types"].split(", ")
    assert sorted(types) == sorted(storage.name for storage in STORAGE.values())
    _, splits = stated["GGUF vocabularies"].split("pre-tokenizers ")
    assert splits.split(", ") == sorted(PRE_TOKENIZERS)
    aliases = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt-2"}
    encoders = {"bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "nomic-bert"}
    encoders |= {"t5", "mt5", "bart", "marian"}
    found = {name.replace("_", "-") for name in FAMILIES}
    assert {name.replace("-", "") for name in aliases} | encoders == found
    aliases |= encoders
    assert all(name in stated["families"].lower() for name in aliases)


def test_every_word_of_the_glossary_is_used() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("\n## Glossary\n", 1)[1].split("\n## ", 1)[0]
    words = re.findall(r"^\| ([\w ]+) \|", section, re.MULTILINE)[1:]
    assert len(words) >= 12
    sources = " ".join(
        path.read_text(encoding="utf-8").lower()
        for layer in ("model", "service")
        for path in (ROOT / layer).rglob("*.py")
    )
    assert [word for word in words if word.lower() not in sources] == []


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:model|service|tests|loadtest|deploy)/[\w./-]+)`", DOCUMENTATION))
    assert named
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z-]+)", DOCUMENTATION, re.MULTILINE)
    assert set(named) <= targets


def test_every_module_that_is_named_exists() -> None:
    named = set(re.findall(r"python -m ((?:model|service|tests|loadtest)[\w.]*)", DOCUMENTATION))
    assert named
    files = [ROOT / name.replace(".", "/") for name in named]
    missing = [
        f for f in files if not (f.with_suffix(".py").exists() or (f / "__main__.py").exists())
    ]
    assert missing == []


@pytest.mark.slow
def test_command_line_examples_are_accepted() -> None:
    """Each `quire ...` line of the documentation names commands and flags that exist."""
    commands = re.findall(r"^quire (.*)$", DOCUMENTATION, re.MULTILINE)
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)
        command = words[: 2 if words[0] == "tune" else 1]
        shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, command
        for flag in (word for word in words if word.startswith("--")):
            assert flag.split("=")[0] in shown.stdout, (command, flag)


@pytest.mark.slow
def test_curl_examples_answer(server_url: str) -> None:
    """Every curl command of the documentation, run against the default model: each must succeed."""
    blocks = re.findall(r"```sh\n(curl .*?)```", DOCUMENTATION, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        script = block.replace("http://127.0.0.1:8000", server_url)
        run = subprocess.run(
            ["bash", "-euc", script], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        assert run.returncode == 0, run.stderr
        assert '"error"' not in run.stdout, run.stdout
        assert re.search(r'"(choices|data|answers)"', run.stdout), run.stdout


@pytest.mark.slow
def test_python_examples_run(server_url: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        script = tmp_path / "example.py"
        script.write_text(block.replace("http://127.0.0.1:8000", server_url))
        run = subprocess.run(
            [sys.executable, str(script)],
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * PATIENCE,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip()


@pytest.mark.slow
def test_the_commands_for_redis_run_together(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The block as it is written, one process for each line, on one machine.

    Ports of Redis and of the API are free ones and the model is a tiny one: the machine may have
    other servers. The admin ports are the default one and its successor, or the next free ones.
    """
    section = README.split("\n## Answers that survive\n", 1)[1]
    block = re.search(r"```\n(redis-server .*?)```", section, re.DOTALL)
    assert block
    redis, *replicas = block[1].splitlines()
    assert [line.split()[:2] for line in replicas] == [["quire", "engine"], ["quire", "api"]]
    redis_port, api_port = free_port(), free_port()
    environment = {name: os.environ[name] for name in ("PATH", "HOME")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "QUIRE_MODEL": str(tiny_model.write_folder(tmp_path / "tiny")),
        "QUIRE_PORT": str(api_port),
        "QUIRE_LOG_FORMAT": "json",
    }
    logs = [tmp_path / "redis.log", tmp_path / "engine.log", tmp_path / "api.log"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command, log in zip([f"{redis} --port 6379", *replicas], logs, strict=True):
            words = shlex.split(command.replace("6379", str(redis_port)))
            with log.open("wb") as output:
                started.append(
                    subprocess.Popen(
                        words, cwd=tmp_path, env=environment, stdout=output, stderr=output
                    )
                )
            wait_for_redis(redis_port, started[0], log=logs[0])
        url = f"http://127.0.0.1:{api_port}"
        wait_until_ready(url, started[2], log=logs[2])
        admins = [
            metrics_url(process, log) for process, log in zip(started[1:], logs[1:], strict=True)
        ]
        assert len(set(admins)) == 2
        for admin, role in zip(admins, ("engine", "api"), strict=True):
            assert f'role="{role}"' in httpx.get(admin, timeout=PATIENCE).text
        body = {"model": "tiny", "prompt": "the quick", "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
        assert answer.json()["usage"]["completion_tokens"] == 4, answer.text
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=PATIENCE)


def wait_for_redis(port: int, process: subprocess.Popen[bytes], *, log: Path) -> None:
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def metrics_url(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that the banner names, which is the last thing that a start does."""
    ends = time.monotonic() + 2 * PATIENCE
    while time.monotonic() < ends:
        found = re.search(r'"metrics": "([^"]+)"', log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())
