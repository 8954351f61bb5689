"""Command-line agents: one prompt each, without a terminal, ends with the answer and exit code 0.

The model is `small_model.py`'s: the prompts have up to 30,000 tokens, and the protocol is tested,
not the wit. Telemetry and updates are off, and a proxy that does not exist takes what an agent
sends elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Server, free_port, wait_until_ready

AGENTS = Path(__file__).parent / "agents" / "node_modules"
MODEL = "small-model"
PROMPT = "Answer with the word ok."
CODEX_CONFIG = """
model = "{model}"
model_provider = "quire"
check_for_update_on_startup = false
[analytics]
enabled = false
[model_providers.quire]
name = "Quire"
base_url = "{url}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""


@pytest.fixture(scope="session")
def large_server(pytestconfig: pytest.Config, tmp_path_factory: Any) -> Iterator[Server]:
    """`quire serve` with a small model of a large context and the default model's tokenizer."""
    folder = tmp_path_factory.mktemp("large")
    model, log = folder / "model.gguf", folder / "log"
    program = Path(str(pytestconfig.getoption("--quire")))
    pulled = subprocess.run([program, "pull"], check=True, cwd=ROOT, capture_output=True, text=True)
    source = pulled.stdout.split()[-1]
    script = Path(__file__).parent / "small_model.py"
    subprocess.run([program.parent / "python", script, source, model], check=True, cwd=ROOT)
    port, admin_port = free_port(), free_port()
    command = [program, "serve", "--model", model, "--model-name", MODEL]
    command += ["--port", str(port), "--admin-port", str(admin_port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    started = Server(
        url=f"http://127.0.0.1:{port}", admin_url=f"http://127.0.0.1:{admin_port}", model=MODEL
    )
    try:
        wait_until_ready(started, process, log)
        yield started
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text()


def needs(package: str) -> None:
    """Skips a test whose agent has no program for this platform."""
    if not list(AGENTS.glob(f"{package}-*")):
        pytest.skip(f"{package} has no package for this platform that could be installed")


def run(
    command: list[str | Path], home: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A run in an empty folder and an empty home."""
    work = home / "work"
    work.mkdir()
    return subprocess.run(
        command,
        cwd=work,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "NO_PROXY": "127.0.0.1",
            **variables,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def claude(server: Server, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run(
        ["node", AGENTS / "@anthropic-ai/claude-code/cli-wrapper.cjs", "-p", PROMPT, *options],
        home,
        ANTHROPIC_BASE_URL=server.url,
        ANTHROPIC_API_KEY="none",
        ANTHROPIC_MODEL=server.model,
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_AUTOUPDATER="1",
    )


@pytest.mark.proves("Claude Code", "streams", "tools")
def test_claude_code_ends_with_the_answer(large_server: Server, tmp_path: Path) -> None:
    """Its requests stream, and have two dozen tools."""
    needs("@anthropic-ai/claude-code")
    ended = claude(large_server, tmp_path, "--output-format", "json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout)
    assert (result["result"], result["stop_reason"], result["is_error"]) == (
        "ok",
        "end_turn",
        False,
    )
    assert result["usage"]["input_tokens"] > 5000


@pytest.mark.proves("Claude Code", "errors")
def test_claude_code_shows_an_error_of_the_server(large_server: Server, tmp_path: Path) -> None:
    needs("@anthropic-ai/claude-code")
    ended = claude(large_server, tmp_path, "--model", "nope")
    assert ended.returncode != 0
    assert "model" in ended.stdout + ended.stderr


def codex(server: Server, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    folder = home / ".codex"
    folder.mkdir()
    config = CODEX_CONFIG.format(model=server.model, url=server.url)
    (folder / "config.toml").write_text(config)
    command: list[str | Path] = ["node", AGENTS / "@openai/codex/bin/codex.js", "exec"]
    return run([*command, "--skip-git-repo-check", "--json", *options, PROMPT], home)


@pytest.mark.proves("Codex CLI", "streams", "tools")
def test_codex_ends_with_the_answer(large_server: Server, tmp_path: Path) -> None:
    """Its requests stream, and have functions, a namespace of them and a hosted tool."""
    needs("@openai/codex")
    ended = codex(large_server, tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    events = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    messages = [event["item"] for event in events if event["type"] == "item.completed"]
    assert [item["text"] for item in messages if item["type"] == "agent_message"] == ["ok"]
    assert events[-1]["type"] == "turn.completed"
    assert events[-1]["usage"]["input_tokens"] > 5000


@pytest.mark.proves("Codex CLI", "errors")
def test_codex_shows_an_error_of_the_server(large_server: Server, tmp_path: Path) -> None:
    needs("@openai/codex")
    ended = codex(large_server, tmp_path, "--model", "nope")
    assert ended.returncode != 0
    assert "unknown model" in ended.stdout
