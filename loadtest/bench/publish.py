"""Writes a comparison into documents: a section per kind of CPU, a short table for the README.

A section stands between two comments that name its kind, and replaces the one of the same kind.
Other text, other kinds' sections included, stays as it is.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from loadtest.bench.document import Document
from loadtest.bench.overview import is_busy, overview, short_table
from loadtest.bench.report import method

_ROOT = Path(__file__).parents[2]
BENCHMARKS, README = _ROOT / "docs" / "benchmarks.md", _ROOT / "README.md"
_WIDTH = 108  # of a paragraph
_END = "<!-- end of comparisons -->"  # new kinds are added above it


def section(document: Document) -> str:
    """Of one kind of CPU."""
    tables = "\n".join(table.to_markdown() for table in overview(document))
    command = f"```\n{document.command}\n```"
    text = (textwrap.fill(paragraph, _WIDTH) for paragraph in method(document))
    return "\n\n".join([f"### {document.kind}", command, *text, tables])


def short_section(document: Document) -> str:
    """For a README."""
    table = short_table(document)
    where = f"{document.machine.cpus} cores of {document.kind}"
    busy = " (less is better; other work loaded the machine)" if is_busy(document) else ""
    text = f"{table.title}, {Path(document.model).stem} on {where}, {document.date}{busy}:"
    return f"{textwrap.fill(text, _WIDTH)}\n\n{table.rows_to_markdown()}"


def replace_between(text: str, name: str, body: str, *, end: str | None = None) -> str:
    """Replaces what is between the comments `name` and `end of name`.

    If they are missing, both are added above the comment `end`. Raises ValueError if that is
    missing, too.
    """
    begins, ends = f"<!-- {name} -->", f"<!-- end of {name} -->"
    whole = f"{begins}\n{body.strip()}\n{ends}"
    before, found, rest = text.partition(begins)
    if found:
        _, closed, after = rest.partition(ends)
        if not closed:
            raise ValueError(f"no {ends}")
        return before + whole + after
    if end is None or end not in text:
        raise ValueError(f"neither {begins} nor {end}")
    return text.replace(end, f"{whole}\n\n{end}")


def publish(document: Document, *, readme: bool) -> None:
    """Into docs/benchmarks.md and, if asked to, README.md."""
    name = f"comparison: {document.kind}"
    text = BENCHMARKS.read_text(encoding="utf-8")
    text = replace_between(text, name, section(document), end=_END)
    BENCHMARKS.write_text(text, encoding="utf-8")
    if readme:
        text = README.read_text(encoding="utf-8")
        text = replace_between(text, "comparison", short_section(document))
        README.write_text(text, encoding="utf-8")
