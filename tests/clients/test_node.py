"""The clients that run in Node: one script a client, one run an ability."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

NODE = Path(__file__).parent / "node"


def scripts() -> list[Any]:
    """Every script with every ability."""
    names = {"openai.mjs": "openai (Node)", "ai_sdk.mjs": "Vercel AI SDK"}
    return [
        pytest.param(script, ability, id=f"{script}-{ability}", marks=mark(name, ability))
        for script, name in names.items()
        for ability in ("streams", "tools", "structured", "aborts", "errors")
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
            timeout=100,
        )
        assert run.returncode == 0, run.stdout + run.stderr
