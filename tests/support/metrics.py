"""Reading a process's metrics."""

from __future__ import annotations

import re

import httpx

from tests.support.waiting import PATIENCE


def exposition(admin: str) -> str:
    return httpx.get(f"{admin}/metrics", timeout=PATIENCE).text


def metric(admin: str, name: str) -> float:
    """The sum of a series over its labels, or of the one sample whose labels are in the name."""
    text = exposition(admin)
    found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found, name
    return sum(map(float, found))
