"""A batch survives everything: the short form of `python -m tests.faults.batches`."""

from __future__ import annotations

import random

import pytest

from tests.cluster.cluster import Cluster
from tests.faults.batches import run_batches

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

LINES, KILLS = 2000, 6


async def test_each_line_is_answered_once_whatever_is_killed(
    cluster: Cluster, rng: random.Random
) -> None:
    tally = await run_batches(cluster, rng, lines=LINES, kills=KILLS)
    assert tally.failures == []
    assert tally.kills.total() == KILLS
