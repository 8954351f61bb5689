"""The words of SVG that our drawings share. No library."""

from __future__ import annotations

from xml.sax.saxutils import escape


def write_text(
    text: str, *, x: float, y: float, fill: str, size: int = 12, weight: int = 400,
    anchor: str = "start",
) -> str:  # fmt: skip
    """A line of text; what has a meaning in XML is escaped."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}" font-weight="{weight}"'
        f' text-anchor="{anchor}">{escape(text)}</text>'
    )
