"""Pipeline: steps in flight in the runner. Plans go in, their results come out in order.

    runner is synchronous       launch(N) .... collect(N)   launch(N + 1) .... collect(N + 1)
    runner overlaps steps       launch(N + 1)   collect(N)   launch(N + 2)   collect(N + 1)

With overlapped steps a device computes step N + 1 while the host reads step N, delivers its tokens
and plans step N + 2. The price: if step N turns out to be a sequence's last, what step N + 1
computed of it is discarded.

If step N must be read before step N + 1 is planned, because of penalties, grammars or drafts, the
device pauses meanwhile. A runner that defers sampling computes the layers of step N + 1 while step
N is read, and gets its penalties and masks then (`sample`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from model.batch import Batch, Bools, StepOutput
from model.runners import Runner, deferring, overlapped
from service.engine.pack import Packer, unread_rows
from service.engine.plan import Plan
from service.engine.speculate import FEW_TO_SPELL
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
    sample: Callable[[], None] | None = None  # what is left to launch, if that was deferred


class Pipeline:
    """Steps of one engine that were launched and not read."""

    def __init__(self, runner: Runner, packer: Packer, *, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._overlapped = overlapped(runner)
        self._deferring = deferring(runner)
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

    def must_be_read(self, num_running: float) -> bool:
        """Whether the next step needs a token that is in flight, or the number of them; also to
        draft what grammars force, if few sequences are running, all of which wait for that.
        """
        for flight in self._flights:
            waiting = [each for each in flight.plan.sampling if each.chooses_by_tokens]
            guides = [each.guide for each in waiting if each.guide is not None]
            spells = num_running**2 < sum(FEW_TO_SPELL[guide.takes_argmax] for guide in guides)
            if flight.plan.drafts or spells or (waiting and self._deferring is None):
                return True
        return False

    @property
    def deferred(self) -> Plan | None:
        """The plan of the newest step if that is yet to `sample`."""
        newest = self._flights[-1] if self._flights else None
        return None if newest is None or newest.sample is None else newest.plan

    def sample(self) -> None:
        """Launches what was deferred. The step before has been read."""
        flight = self._flights.pop()
        if flight.sample is not None:
            flight.sample()
        self._flights.append(replace(flight, sample=None))

    def idle(self) -> None:
        """The next step does not follow the previous one."""
        self._emptied = None

    def launch(self, plan: Plan, *, meanwhile: Callable[[], None]) -> None:
        """Packs and launches a step. Called before the scheduler's `launched`.

        `meanwhile` is called when only the runner's part is left: before the call of a synchronous
        runner, after launching with one that overlaps steps.
        """
        unread_T = unread_rows(plan)
        deferred = any(each.num_unread and each.chooses_by_tokens for each in plan.sampling)
        batch = self._packer.pack(plan, deferred=deferred)
        if self._overlapped is None:
            meanwhile()
        began = self._clock()
        read, sample = self._launch(plan, batch, unread_T, deferred=deferred)
        launched = self._clock()
        if self._overlapped is not None:
            meanwhile()
        pause = 0.0 if self._emptied is None else launched - self._emptied
        self._emptied = None
        self._flights.append(
            _Flight(
                plan=plan,
                read=read,
                launch_duration=launched - began,
                pause=pause,
                sample=sample,
            )
        )

    def _launch(
        self, plan: Plan, batch: Batch, unread_T: Bools | None, *, deferred: bool
    ) -> tuple[Callable[[], StepOutput], Callable[[], None] | None]:
        """Returns a function that waits for the step, and one that launches what was deferred."""
        if self._overlapped is None:
            output = self._runner.run(batch)
            return (lambda: output), None
        if not deferred:
            handle = self._overlapped.launch(batch, unread_T=unread_T)
            return partial(self._overlapped.collect, handle), None
        runner = self._deferring
        if runner is None:
            raise ValueError("the runner cannot sample later")
        handle = runner.launch(batch, unread_T=unread_T, deferred=True)

        def sample() -> None:
            runner.sample(handle, self._packer.adjusted(plan, batch.sampling))

        return partial(runner.collect, handle), sample

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
