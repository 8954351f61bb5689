"""What keeps `make unit` short: of each function it runs a few cases."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.conftest import MARKERS, UNIT_CASES


@pytest.mark.parametrize("case", range(2 * UNIT_CASES))
def test_further_cases_are_slow(request: pytest.FixtureRequest, case: int) -> None:
    """Its own cases would be too many, if the tests were not marked when they are collected."""
    items = request.session.items
    fast = [item for item in items if MARKERS.isdisjoint(mark.name for mark in item.iter_markers())]
    cases = Counter(item.nodeid.partition("[")[0] for item in fast)
    assert max(cases.values(), default=0) <= UNIT_CASES
