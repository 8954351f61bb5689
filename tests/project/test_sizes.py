"""The size of the code base: ceilings on packages and files, and nothing written twice.

"Read in an afternoon" is a promise. A ceiling is raised only together with a line in CHANGELOG.md
that states what users get for it.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = frozenset({".py", ".cpp", ".h", ".inl", ".lua", ".js", ".css", ".html"})
CEILINGS = {"model": 23_170, "service": 34_215, "loadtest": 6_600}  # non-blank lines
LARGEST_FILE = 350
REPEATED = 6  # identical lines in a row


def sources(package: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / package).rglob("*")) if path.suffix in SOURCES)


def lines(path: Path) -> list[str]:
    stripped = map(str.strip, path.read_text(encoding="utf-8").splitlines())
    return [line for line in stripped if line]


@pytest.mark.parametrize("package", CEILINGS)
def test_a_package_stays_below_its_ceiling(package: str) -> None:
    assert sum(len(lines(path)) for path in sources(package)) <= CEILINGS[package]


def test_no_file_has_outgrown_its_page() -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(lines(path))
        for package in CEILINGS
        for path in sources(package)
    }
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE} == {}


@pytest.mark.slow
def test_no_six_lines_stand_in_two_files() -> None:
    """Imports and the ends of brackets aside: they repeat by nature."""
    places: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for package in CEILINGS:
        for path in sources(package):
            own = own_lines(path)
            for start in range(len(own) - REPEATED + 1):
                places[tuple(own[start : start + REPEATED])].add(str(path.relative_to(ROOT)))
    assert {run: files for run, files in places.items() if len(files) > 1} == {}


def own_lines(path: Path) -> list[str]:
    """Stripped lines of a file without imports, signatures (protocols repeat them) and brackets."""
    text = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse("\n".join(text))):
            first, last = getattr(node, "lineno", 1) - 1, 0
            if isinstance(node, ast.Import | ast.ImportFrom):
                last = node.end_lineno or node.lineno
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                last = node.body[0].lineno - 1
            text[first:last] = [""] * (last - first)
    stripped = [line.strip() for line in text]
    return [line for line in stripped if any(map(str.isalnum, line)) and "#include" not in line]
