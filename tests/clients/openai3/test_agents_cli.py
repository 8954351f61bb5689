"""Command-line agents: prompts without a terminal end with the answer and exit code 0.

The model is `small_model.py`'s: the prompts have up to 30,000 tokens, and the protocol is tested,
not the wit. It answers "ok" if the prompt has the word "times"; otherwise it calls the shell of the
agent with the command `times`, and answers when it reads the result. Telemetry and updates are off,
and a proxy that does not exist gets what an agent sends elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Server, small_server

FOLDER = Path(__file__).parent.parent
AGENTS = FOLDER / "agents" / "node_modules"
ANSWER = 'Answer "times" with ok.'
CALL = "Use your shell, then answer."
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
    program = Path(str(pytestconfig.getoption("--quire")))
    with small_server("agent", program, tmp_path_factory.mktemp("large")) as server:
        yield server


def needs(package: str) -> None:
    """Skips a test whose agent has no program for this platform."""
    if not list(AGENTS.glob(f"{package}-*")):
        pytest.skip(f"{package} has no package for this platform that could be installed")


def run(
    command: list[str | Path], home: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A run with this home, in a folder that is empty at first."""
    work = home / "work"
    work.mkdir(exist_ok=True)
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
        timeout=PATIENCE,
    )


def claude(server: Server, home: Path, prompt: str, *options: str) -> dict[str, Any]:
    """The result of one prompt. Raises AssertionError unless the exit code is 0."""
    ended = start_claude(server, home, prompt, "--output-format", "json", *options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def start_claude(
    server: Server, home: Path, prompt: str, *options: str
) -> subprocess.CompletedProcess[str]:
    program = AGENTS / "@anthropic-ai/claude-code/cli-wrapper.cjs"
    return run(
        ["node", program, "-p", prompt, "--allowedTools=Bash", *options],
        home,
        ANTHROPIC_BASE_URL=server.url,
        ANTHROPIC_API_KEY="none",
        ANTHROPIC_MODEL=server.model,
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_AUTOUPDATER="1",
    )


@pytest.mark.proves("Claude Code", "streams")
def test_claude_code_ends_with_the_answer(large_server: Server, tmp_path: Path) -> None:
    needs("@anthropic-ai/claude-code")
    result = claude(large_server, tmp_path, ANSWER)
    assert (result["result"], result["stop_reason"], result["num_turns"]) == ("ok", "end_turn", 1)
    assert result["usage"]["input_tokens"] > 5000


@pytest.mark.proves("Claude Code", "tools", "turns")
def test_claude_code_calls_its_shell(large_server: Server, tmp_path: Path) -> None:
    """The second turn has the prompt of the first in the prefix cache. Its session goes on."""
    needs("@anthropic-ai/claude-code")
    result = claude(large_server, tmp_path, CALL)
    assert (result["result"], result["stop_reason"], result["num_turns"]) == ("ok", "end_turn", 2)
    assert not result["permission_denials"]
    assert result["usage"]["cache_read_input_tokens"] > 5000
    again = claude(large_server, tmp_path, "And again.", "--continue")
    assert (again["result"], again["session_id"]) == ("ok", result["session_id"])


@pytest.mark.proves("Claude Code", "errors")
def test_claude_code_shows_an_error_of_the_server(large_server: Server, tmp_path: Path) -> None:
    needs("@anthropic-ai/claude-code")
    ended = start_claude(large_server, tmp_path, ANSWER, "--model", "nope")
    assert ended.returncode != 0
    assert "model" in ended.stdout + ended.stderr


def codex(
    server: Server, home: Path, prompt: str, *options: str
) -> subprocess.CompletedProcess[str]:
    folder = home / ".codex"
    folder.mkdir(exist_ok=True)
    config = CODEX_CONFIG.format(model=server.model, url=server.url)
    (folder / "config.toml").write_text(config)
    command: list[str | Path] = ["node", AGENTS / "@openai/codex/bin/codex.js", "exec"]
    return run([*command, "--skip-git-repo-check", "--json", *options, prompt], home)


def said(done: list[dict[str, Any]]) -> list[str]:
    return [item["text"] for item in done if item["type"] == "agent_message"]


def items(ended: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What a run that ended well has said and done."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
    events = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert events[-1]["type"] == "turn.completed"
    assert events[-1]["usage"]["input_tokens"] > 5000
    return [event["item"] for event in events if event["type"] == "item.completed"]


@pytest.mark.proves("Codex CLI", "streams")
def test_codex_ends_with_the_answer(large_server: Server, tmp_path: Path) -> None:
    needs("@openai/codex")
    done = items(codex(large_server, tmp_path, ANSWER))
    assert said(done) == ["ok"]
    assert not [item for item in done if item["type"] == "command_execution"]


@pytest.mark.proves("Codex CLI", "tools", "turns")
def test_codex_calls_its_shell(large_server: Server, tmp_path: Path) -> None:
    needs("@openai/codex")
    done = items(codex(large_server, tmp_path, CALL))
    (called,) = [item for item in done if item["type"] == "command_execution"]
    assert called["command"].endswith("times")
    assert said(done) == ["ok"]
    assert said(items(codex(large_server, tmp_path, "And again.", "resume", "--last"))) == ["ok"]


@pytest.mark.proves("Codex CLI", "errors")
def test_codex_shows_an_error_of_the_server(large_server: Server, tmp_path: Path) -> None:
    needs("@openai/codex")
    ended = codex(large_server, tmp_path, ANSWER, "--model", "nope")
    assert ended.returncode != 0
    assert "unknown model" in ended.stdout
