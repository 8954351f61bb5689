"""Row 1, many times: see `kills`. `--kills N` sets their number and extends the time limit."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable

import pytest

from tests.cluster.cluster import Cluster
from tests.faults.kills import ENGINES, MAX_SEQUENCES, run_kills

pytestmark = [pytest.mark.faults, pytest.mark.timeout(0)]

SECONDS_A_KILL = 6.0  # maximum per kill on a busy machine


async def test_row_1_a_hundred_times(
    own_cluster: Callable[..., Cluster],
    rng: random.Random,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kills = int(request.config.getoption("--kills", default=100))
    cluster = await asyncio.to_thread(
        own_cluster, num_engines=ENGINES, num_apis=2, max_sequences=MAX_SEQUENCES
    )
    async with asyncio.timeout(60 + SECONDS_A_KILL * kills):
        tally = await run_kills(cluster, rng, kills=kills)
    with capsys.disabled():
        sys.stdout.write(f"\n{tally.line(cluster.timings.lease)}\n")
    assert not tally.failures
    assert tally.kills == kills
    assert tally.hit >= kills
