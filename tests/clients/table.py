"""The table of clients and abilities, from the outcomes of the tests that ran."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ABILITIES = ("streams", "tools", "structured", "turns", "aborts", "errors", "batches")
NODE_MODULES = [Path(__file__).parent / name / "node_modules" for name in ("node", "agents")]

# client -> (package, whether of npm)
PACKAGES = {
    "openai 2 (Python)": ("openai", False),
    "openai 3 (Python)": ("openai", False),
    "openai (Node)": ("openai", True),
    "openai-agents (Python)": ("openai-agents", False),
    "openai-agents (Node)": ("@openai/agents", True),
    "anthropic": ("anthropic", False),
    "Vercel AI SDK": ("ai", True),
    "pydantic-ai": ("pydantic-ai-slim", False),
    "langchain-openai": ("langchain-openai", False),
    "llama-index": ("llama-index-llms-openai-like", False),
    "instructor": ("instructor", False),
    "haystack": ("haystack-ai", False),
    "litellm": ("litellm", False),
    "llm": ("llm", False),
    "Claude Code": ("@anthropic-ai/claude-code", True),
    "Codex CLI": ("@openai/codex", True),
    "llm-comply": ("llm-comply", False),
}


class Table:
    """Outcomes by client and ability."""

    def __init__(self) -> None:
        self._outcomes: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, client: str, abilities: Sequence[str], report: Any) -> None:
        """One test's outcome."""
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        self._counts[client][outcome] += 1
        for ability in abilities:
            self._outcomes[client, ability].append(outcome)

    def render(self) -> str:
        """In Markdown. An ability counts where all of its tests passed, and there were some."""
        lines = [
            "| client | version | " + " | ".join(ABILITIES) + " | tests |",
            "|---|---|" + "---|" * (len(ABILITIES) + 1),
        ]
        for client in PACKAGES:
            if client in self._counts:
                cells = [client, _version(client)]
                cells += [_cell(self._outcomes[client, ability]) for ability in ABILITIES]
                cells.append(_tests(self._counts[client]))
                lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def _cell(outcomes: Sequence[str]) -> str:
    if not outcomes:
        return "-"
    return "yes" if set(outcomes) == {"passed"} else "no"


def _tests(counts: Counter[str]) -> str:
    words = {"xfailed": "expected to fail"}
    return ", ".join(f"{number} {words.get(name, name)}" for name, number in sorted(counts.items()))


def _version(client: str) -> str:
    package, of_npm = PACKAGES[client]
    if of_npm:
        (path,) = [found for modules in NODE_MODULES if (found := modules / package).exists()]
        return str(json.loads((path / "package.json").read_text())["version"])
    return version(package)
