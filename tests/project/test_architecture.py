"""The import rules, walked. A module that imports what its layer may not know fails here.

`ALLOWED` is the architecture: longest matching prefix wins. Imports under `TYPE_CHECKING` and
inside functions count too: a rule that a lazy import could break would be none.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LAYERS = ("model", "service")

# module prefix -> prefixes it may import, the standard library and itself aside
ALLOWED: dict[str, tuple[str, ...]] = {
    "model": ("torch", "numpy", "triton", "model"),
    "model.config": (),
    "model.batch": ("numpy",),
    "model.checkpoint": (
        "torch", "numpy", "model", "gguf", "safetensors", "tokenizers", "huggingface_hub",
        "filelock",
    ),
    "model.text": ("model.checkpoint", "model.text", "tokenizers", "jinja2"),
    "model.training": ("torch", "numpy", "model", "tokenizers", "safetensors", "pyarrow"),
    "model.grammar": ("llguidance", "model.batch"),
    "model.grammar_validator": ("model.grammar",),
    "service": ("service.decoding", "service.errors", "service.messages"),
    "service.setting_types": ("pydantic", "model.compression"),
    "service.settings": ("pydantic", "service.errors", "service.setting_types"),
    "service.setting_rows": ("pydantic", "service.settings"),
    "service.keys": ("pydantic", "service.errors"),
    "service.chat": ("httpx", "rich", "service.errors"),
    "service.engine": (
        "numpy", "model.batch", "model.compression", "model.grammar", "model.runners",
        "model.segments", "service.messages", "service.errors", "service.prefixes",
        "service.thinking", "service.vectors", "service.engine",
    ),
    "service.queues": (
        "service.decoding", "service.messages", "service.errors", "service.queues",
    ),
    "service.queues.redis": (
        "redis", "service.decoding", "service.messages", "service.errors", "service.queues",
    ),
    "service.vectors": ("numpy",),
    "service.batches": (
        "fsspec", "orjson", "service.decoding", "service.messages", "service.errors",
        "service.fair_pool", "service.queues", "service.batches",
    ),
    "service.jobs": ("service.batches", "service.settings"),
    "service.cluster": ("service.messages", "service.errors", "service.queues"),
    "service.worker": (
        "service.engine", "service.fair_pool", "service.queues", "service.messages",
        "service.errors", "service.worker",
    ),
    "service.api": (
        "fastapi", "starlette", "python_multipart", "pydantic", "pydantic_core", "orjson",
        "model.text", "model.grammar", "model.grammar_validator", "service.decoding",
        "service.messages", "service.errors", "service.fair_pool", "service.prefixes",
        "service.queues", "service.api", "service.batches", "service.keys", "service.thinking",
        "service.vectors",
    ),
    "service.http": (
        "uvicorn", "httptools", "fastapi", "service.errors", "service.settings", "service.api",
        "service.http",
    ),
    "service.observability": (
        "prometheus_client", "opentelemetry", "service.messages", "service.queues",
        "service.engine.observer", "service.api.http.observer", "service.worker.observer",
        "service.http.connections", "service.observability",
    ),
    "service.app": (
        "fastapi", "starlette", "model.grammar", "model.text", "service.messages",
        "service.errors", "service.fair_pool", "service.queues", "service.api",
        "service.batches",
    ),
    "service.startup": (
        "rich", "model", "service.messages", "service.errors", "service.settings",
        "service.setting_types",
    ),
    "service.tune": (
        "rich", "typer", "torch", "model", "service.errors", "service.settings", "service.startup",
        "service.training_run",
    ),
    "service.training_run": ("rich", "typer", "model.training", "model.transformer"),
    "service.bench": ("orjson", "pydantic", "rich", "service.errors", "service.bench"),
    "service.encoders": (
        "model", "service.messages", "service.errors", "service.settings",
        "service.setting_types", "service.startup",
    ),
    "service.models": (
        "rich", "model", "service.messages", "service.errors", "service.settings",
        "service.setting_types", "service.startup", "service.encoders",
    ),
    "service.banner": ("rich", "service.settings", "service.encoders", "service.models"),
    "service.doctor": (
        "rich", "torch", "model", "service.errors", "service.settings", "service.setting_types",
        "service.queues", "service.startup", "service.encoders", "service.jobs",
        "service.batches", "service.doctor",
    ),
    "service.parts": ("",),
    "service.roles": ("",),
    "service.__main__": ("",),
}  # fmt: skip
MAX_API = {"files": 71, "arrows": 29, "layers": 6}
FORBIDDEN_EVERYWHERE = ("pickle", "pydantic_settings")

TORCH_FREE = (
    "service.messages", "service.errors", "service.settings", "service.observability.metrics",
    "service.observability.tracing", "service.worker.worker", "service.engine.sequence",
    "service.engine.blocks", "service.engine.scheduler", "service.engine.detokenize",
    "service.queues.memory.queue", "service.queues.redis.queue", "service.api", "service.app",
    "service.bench.run", "service.chat", "service.tune", "service.cluster", "service.parts",
    "service.roles",
    "service.startup", "service.__main__",
    "model.checkpoint.fetch", "model.checkpoint.gguf", "model.checkpoint.safetensors",
    "model.checkpoint.assemble", "model.runners.native", "model.runners.choose", "model.parallel",
    "model.runners.encoding", "model.runners.native_encoding",
    "model.families.llama", "model.compression", "model.config", "model.batch", "model.grammar",
    "model.segments",
    "model.grammar_validator", "model.text.tokenizer", "model.text.template_process",
)  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the two packages, as (dotted name, file)."""
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@cache
def nodes(path: Path) -> Sequence[ast.AST]:
    """The syntax tree of a file."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever the statement stands."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(not prefix or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def rule(module: str) -> tuple[str, ...]:
    """The row of the longest matching prefix."""
    matching = [p for p in ALLOWED if module == p or module.startswith(p + ".")]
    assert matching, f"{module} has no rule: add it to ALLOWED"
    return ALLOWED[max(matching, key=len)]


def breaches(module: str, path: Path) -> list[str]:
    """What a module imports and may not."""
    allowed = (*rule(module), module)
    found = []
    for name in imports(path):
        top = name.split(".")[0]
        if within(name, FORBIDDEN_EVERYWHERE):
            found.append(name)
        elif top in sys.stdlib_module_names:
            continue
        elif not within(name, allowed) and not any(p.startswith(name + ".") for p in allowed):
            found.append(name)
    return found


def test_modules_import_only_what_their_layer_may_know() -> None:
    found = {module: breaches(module, path) for module, path in modules()}
    assert {module: names for module, names in found.items() if names} == {}


def test_the_walk_sees_a_breach(tmp_path: Path) -> None:
    culprit = tmp_path / "scheduler.py"
    culprit.write_text("def f():\n    import torch\n    from service.api import sse\n")
    assert breaches("service.engine.scheduler", culprit) == [
        "torch",
        "service.api",
        "service.api.sse",
    ]


def test_the_folders_of_the_api_stay_few_and_loosely_coupled() -> None:
    """An arrow leads from a folder to another one that it imports. There are no cycles."""
    found = [(module, path) for module, path in modules() if within(module, ("service.api",))]
    arrows = {
        (folder_of(module), folder_of(name))
        for module, path in found
        for name in imports(path)
        if within(name, ("service.api",)) and folder_of(name) != folder_of(module)
    }
    folders = {folder_of(module) for module, _ in found}
    size = {"files": len(found), "arrows": len(arrows), "layers": num_layers(folders, arrows)}
    assert {name: n for name, n in size.items() if n > MAX_API[name]} == {}


def folder_of(module: str) -> str:
    """The folder of `service.api`, or its loose file; empty: `service.api` itself."""
    return ".".join(module.split(".")[2:3])


def num_layers(folders: set[str], arrows: set[tuple[str, str]]) -> int:
    """The length of the longest path of arrows. Raises AssertionError if there is a cycle."""
    layers = 0
    while folders:
        lowest = folders - {importer for importer, imported in arrows if imported in folders}
        assert lowest, f"import each other: {sorted(folders)}"
        folders, layers = folders - lowest, layers + 1
    return layers


def test_is_torch_free() -> None:
    """One process imports them one after another and names the first that brings torch along."""
    code = (
        "import sys, importlib\n"
        f"for name in {TORCH_FREE!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(name)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


ENVIRONMENT = re.compile(r"os\.(environ|getenv|putenv)")
CHANGE = re.compile(r"os\.(putenv|environ(\[.*\] =|\.(update|setdefault|pop|clear)))")


def test_settings_reads_the_environment_and_startup_sets_it() -> None:
    """`startup` sets variables of libraries, unless they are set; settings come from `settings`."""
    texts = {module: path.read_text(encoding="utf-8") for module, path in modules()}
    users = {module for module, text in texts.items() if ENVIRONMENT.search(text)}
    assert users == {"service.settings", "service.startup"}
    assert not CHANGE.search(texts["service.settings"])
    assert "QUIRE_" not in texts["service.startup"]


def test_broad_excepts_are_at_most_two() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module, path in modules()
        for node in nodes(path)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
    ]
    assert len(found) <= 2, found


SHARED_THREADS = {
    "service.api.system.openapi": "one rendering per model card, however many ask",
    "service.app": "to end",
    "service.roles": "to load the model, and to end",
    "service.worker.worker": "to end",
}


def test_what_clients_cause_has_threads_of_its_own() -> None:
    """The default executor is one line for all: what clients can fill it with keeps all else
    waiting. Each kind of work has a `FairPool`, or a thread.
    """
    found = {
        module
        for module, path in modules()
        for node in nodes(path)
        if isinstance(node, ast.Call) and uses_shared_threads(node)
    }
    assert found <= SHARED_THREADS.keys()


def uses_shared_threads(call: ast.Call) -> bool:
    name = ast.unparse(call.func).split(".")[-1]
    if name == "run_in_executor":
        return ast.unparse(call.args[0]) == "None"
    return name in {"to_thread", "run_in_threadpool"}
