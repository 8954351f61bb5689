"""A table of text, for a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text. The first column is left-aligned, all others right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        return f"**{self.title}**\n\n{self.rows_to_markdown()}"

    def rows_to_markdown(self) -> str:
        """Without the title."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return "\n".join(lines) + "\n"


def number(value: float, digits: int = 0, *, unit: str = "") -> str:
    """Empty for NaN."""
    return "" if math.isnan(value) else f"{value:.{digits}f}{unit}"
