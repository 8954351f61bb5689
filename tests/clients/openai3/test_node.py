"""The clients that run in Node: a script per client, a run per ability."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

NODE = Path(__file__).parent.parent / "node"


ABILITIES = ("streams", "tools", "structured", "turns", "aborts", "errors")
SCRIPTS = {
    "openai.mjs": ("openai (Node)", ABILITIES),
    "ai_sdk.mjs": ("Vercel AI SDK", ABILITIES),
    "agents.mjs": ("openai-agents (Node)", ("streams", "tools", "structured", "turns", "errors")),
}


def scripts() -> list[Any]:
    """Every script with each of its abilities."""
    return [
        pytest.param(script, ability, id=f"{script}-{ability}", marks=mark(name, ability))
        for script, (name, abilities) in SCRIPTS.items()
        for ability in abilities
    ]


def mark(name: str, ability: str) -> Any:
    return pytest.mark.proves(name, ability)


@pytest.mark.parametrize(("script", "ability"), scripts())
def test_it_can(server: Any, expect_cancel: Any, script: str, ability: str) -> None:
    with expect_cancel() if ability == "aborts" else nullcontext():
        run = subprocess.run(
            ["node", script, ability, server.url, server.model],
            cwd=NODE,
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        assert run.returncode == 0, run.stdout + run.stderr
