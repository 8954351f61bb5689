"""The generated pages of docs/ are up to date."""

from __future__ import annotations

import pytest

from tests.project.reference import DOCS, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_generates(name: str) -> None:
    """If not: `python -m tests.project.reference`."""
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name]()
