"""Pipeline: steps in flight in the runner. Plans go in, their results come out in order.

    runner is synchronous       launch(N) .... collect(N)   launch(N + 1) .... collect(N + 1)
    runner overlaps steps       launch(N + 1)   collect(N)   launch(N + 2)   collect(N + 1)

With overlapped steps a device computes step N + 1 while the host reads step N, delivers its tokens
and plans step N + 2. The price: if step N turns out to be a sequence's last, what step N + 1
computed of it is discarded.

If step N must be read before step N + 1 is planned, because of penalties, grammars or drafts, the
device pauses meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from model.batch import Batch, Bools, StepOutput
from model.runners import Runner, overlapped
from service.engine.pack import Packer, unread_rows
from service.engine.plan import Plan
from service.engine.segments import SegmentPacker
from service.engine.unpack import StepResult, unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A step that was read. `run_duration`: seconds in the runner, launching and waiting. `pause`:
    seconds before it in which a runner that overlaps steps had none. `seconds`: as the runner
    measured it, or None.
    """

    plan: Plan
    result: StepResult
    run_duration: float
    pause: float
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    plan: Plan
    read: Callable[[], StepOutput]  # waits for it
    launch_duration: float
    pause: float


class Pipeline:
    """Steps of one engine that were launched and not read."""

    def __init__(
        self, runner: Runner, packer: Packer | SegmentPacker, *, clock: Callable[[], float]
    ) -> None:
        self._runner = runner
        self._overlapped = overlapped(runner)
        self._packer = packer
        self._clock = clock
        self._flights: deque[_Flight] = deque()
        self._emptied: float | None = None  # since when no step is in flight; None while idle

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def most_ahead(self) -> int:
        """Steps that may be in flight while the next one is planned."""
        return 0 if self._overlapped is None else 1

    @property
    def must_be_read(self) -> bool:
        """Whether the next step needs a token that is in flight, or the number of them."""
        return any(
            flight.plan.drafts or any(each.chooses_by_tokens for each in flight.plan.sampling)
            for flight in self._flights
        )

    def idle(self) -> None:
        """The next step does not follow the previous one."""
        self._emptied = None

    def launch(self, plan: Plan, *, meanwhile: Callable[[], None]) -> None:
        """Packs and launches a step. Called before the scheduler's `launched`.

        `meanwhile` is called when only the runner's part is left: before the call of a synchronous
        runner, after launching with one that overlaps steps.
        """
        batch, unread_T = self._packer.pack(plan), unread_rows(plan)
        if self._overlapped is None:
            meanwhile()
        began = self._clock()
        read = self._launch(batch, unread_T)
        launched = self._clock()
        if self._overlapped is not None:
            meanwhile()
        pause = 0.0 if self._emptied is None else launched - self._emptied
        self._emptied = None
        self._flights.append(
            _Flight(plan=plan, read=read, launch_duration=launched - began, pause=pause)
        )

    def _launch(self, batch: Batch, unread_T: Bools | None) -> Callable[[], StepOutput]:
        """Returns a function that waits for the step."""
        if self._overlapped is None:
            output = self._runner.run(batch)
            return lambda: output
        return partial(self._overlapped.collect, self._overlapped.launch(batch, unread_T=unread_T))

    def collect(self) -> Computed:
        """Waits for the oldest step."""
        flight = self._flights.popleft()
        began = self._clock()
        output = flight.read()
        now = self._clock()
        if self._overlapped is not None and not self._flights:
            self._emptied = now
        return Computed(
            plan=flight.plan,
            result=unpack(flight.plan, output),
            run_duration=flight.launch_duration + now - began,
            pause=flight.pause,
            seconds=output.seconds,
        )
