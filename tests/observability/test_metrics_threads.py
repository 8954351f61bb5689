"""Metrics are written by the engine's thread and read by the event loop."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from service.observability.metrics import Metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def _eager_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_threads")
def test_the_rate_is_read_while_the_engine_steps() -> None:
    """A step that ended in this moment was an error, and the engine exited: "deque mutated during
    iteration". Without the copy it shows within a hundred readings.
    """
    metrics, over = Metrics().of_model("m"), threading.Event()

    def step() -> None:
        while not over.is_set():
            metrics._served.append((time.monotonic(), 1))

    stepping = threading.Thread(target=step)
    stepping.start()
    try:
        for _ in range(2000):
            metrics.tokens_per_second()
    finally:
        over.set()
        stepping.join()
