"""Writes the generated tables in docs/: `python -m tests.project.reference`, or `make docs`.

A page keeps its prose; a table stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from service.api import ROUTERS
from service.api.http.models import UNSUPPORTED
from service.observability.metrics import Metrics
from service.setting_rows import SettingRow, setting_rows

DOCS = Path(__file__).parents[2] / "docs"
_TABLE = re.compile(r"(<!-- generated: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def settings() -> str:
    """A table per group of settings."""
    parts = []
    for group, members in groupby(setting_rows(), key=lambda row: row.group):
        rows = ((f"`{row.flag}`", code(row.default), help_of(row)) for row in members)
        parts.append(f"## {group}\n\n" + table(("flag", "default", "meaning"), rows))
    return "\n".join(parts)


def help_of(row: SettingRow) -> str:
    choices = ", ".join(f"`{choice}`" for choice in row.choices)
    return row.help + (f" One of {choices}." if choices else "")


def metrics() -> str:
    families = sorted(Metrics().registry.collect(), key=lambda family: family.name)
    rows = (
        (f"`{family.name}{'_total' * (family.type == 'counter')}`", family.type, sentence)
        for family in families
        for sentence in (family.documentation.strip().rstrip(".") + ".",)
    )
    return table(("series", "type", "meaning"), rows)


def endpoints() -> str:
    rows = [
        (f"`{method} {route.path}`", route.summary or route.name.replace("_", " "))
        for router in ROUTERS.values()
        for route in router.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in sorted(route.methods or ())
    ]
    rows.append(("`GET /metrics`", "All series in Prometheus' text format; on the admin port only"))
    return table(("endpoint", "purpose"), rows)


def fields() -> str:
    """Each field of a request once, with the endpoints that take it with this meaning."""
    app = FastAPI()
    for router in ROUTERS.values():
        app.include_router(router)
    document = get_openapi(title="", version="", routes=app.routes)
    taken: dict[tuple[str, str], list[str]] = {}
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if body is not None and "application/json" in body["content"]:
            name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
            for field, schema in document["components"]["schemas"][name]["properties"].items():
                taken.setdefault((field, schema.get("description", "")), []).append(f"`{path}`")
    rows = ((f"`{field}`", text, ", ".join(paths)) for (field, text), paths in taken.items())
    return table(("field", "meaning", "endpoints"), rows)


def neutral() -> str:
    """The values of unsupported fields that have no effect."""
    rows = (
        (f"`{name}`", ", ".join(code(json.dumps(value)) for value in _distinct(values)))
        for name, values in sorted(UNSUPPORTED.items())
    )
    return table(("field", "accepted values"), rows)


def _distinct(values: tuple[object, ...]) -> list[object]:
    """Without those that are equal numbers of another type."""
    return [value for index, value in enumerate(values) if value not in values[:index]]


TABLES: Mapping[str, Callable[[], str]] = {
    "settings": settings,
    "metrics": metrics,
    "endpoints": endpoints,
    "fields": fields,
    "neutral": neutral,
}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(map(escaped, cells)) + " |\n" for cells in lines)


def escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def regenerated(page: str) -> str:
    """The text of a page with its tables made anew."""
    return _TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], page)


def main() -> None:
    for path in sorted(DOCS.glob("*.md")):
        path.write_text(regenerated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
