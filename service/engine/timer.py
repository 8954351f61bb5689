"""StepTimer: durations of steps, and whether the current one takes far too long."""

from __future__ import annotations

from collections.abc import Callable

STALL_FACTOR = 10.0  # times the slowest recent step: a stall
STALL_MAX = 20.0  # seconds after which a step is a stall, however long steps take
STALL_DECAY = 0.99  # of the slowest recent step, per step


class StepTimer:
    """Used from the engine's thread, except `is_stalled`, which any thread may call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.steps = 0
        self.busy = False  # the thread is not waiting for work
        self._clock = clock
        self._last_progress = clock()
        self._slowest = 0.0  # seconds, of the recent steps
        self._since: float | None = None  # start of the next step's duration; None while idle

    def begin(self) -> float:
        """Begins a step, unless steps follow one another. Returns the time."""
        now = self._clock()
        if self._since is None:
            self._since = now
        return now

    def count_step(self) -> float:
        """Seconds since the previous step, or since `begin`."""
        now = self._clock()
        duration = 0.0 if self._since is None else now - self._since
        self._since = now
        self._slowest = max(duration, STALL_DECAY * self._slowest)
        self.steps += 1
        return duration

    def idle(self) -> None:
        """The next step does not follow the previous one."""
        self._since = None

    def progress(self) -> None:
        self._last_progress = self._clock()

    def is_stalled(self, *, at_least: float) -> bool:
        """Whether there was no progress, though there is work, for much longer than steps take.

        The bound is `STALL_FACTOR` times the slowest recent step, between `at_least` and
        `STALL_MAX` seconds. Takes no lock: the engine's thread may hold it.
        """
        bound = max(at_least, min(STALL_MAX, STALL_FACTOR * self._slowest))
        return self.busy and self._clock() - self._last_progress > bound
