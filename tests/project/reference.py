"""Writes the pages of docs/ that are generated from the code: `python -m tests.project.reference`.

`test_reference.py` fails if a page is out of date.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from service.settings import setting_rows

DOCS = Path(__file__).parents[2] / "docs"


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Generated from `service/settings.py` by `python -m tests.project.reference`.",
        "",
        "A setting comes from the first of: a flag (`--max-body 8MiB`), an environment variable",
        '(`QUIRE_MAX_BODY=8MiB`), a TOML file (`max_body = "8MiB"`) that `--config` or',
        "`QUIRE_CONFIG` names, its default. Unknown names and invalid values are errors. Sizes in",
        "bytes take units: `512MiB`, `2g`. `--no-...` or `false` turns a switch off.",
    ]
    for group, rows in groupby(setting_rows(), key=lambda row: row.group):
        lines += ["", f"## {group}", "", "| flag | default | |", "|---|---|---|"]
        for row in rows:
            default = f"`{row.default}`" if row.default else ""
            choices = ", ".join(f"`{choice}`" for choice in row.choices)
            text = row.help + (f" One of {choices}." if choices else "")
            lines.append(f"| `{row.flag}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {"settings.md": settings_page}


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    for name, render in PAGES.items():
        (DOCS / name).write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
