"""Turns: the runners of one process compute one step at a time, in turns.

Each model of a process has a runner and a thread that calls it. A step uses all threads of the CPU;
two steps at once would oversubscribe it, and each would wait for the other's late threads. What a
step computes does not depend on its turn.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from model.batch import Batch, Bools, Floats, StepOutput
from model.runners import OverlappedRunner, Runner, StepHandle, overlapped
from model.runners.encoding import Encoding, EncodingRunner


class Turns:
    """A lock that is granted in the order of the calls: no runner is overtaken twice."""

    def __init__(self) -> None:
        self._changes = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._changes:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()  # released by the one before

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        with self._changes:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


def take_turns(runner: Runner, turns: Turns) -> Runner:
    """The runner, whose steps wait for their turn. Of steps on a device, only launches do."""
    ahead = overlapped(runner)
    if ahead is not None and ahead.beside_host:
        return _LaunchedInTurns(ahead, turns)
    return _InTurns(runner, turns)


class _InTurns:
    """A runner in turns with others; everything but its steps is the runner's own.

    None of its steps is launched ahead: its turn would end before it was computed.
    """

    launch: Any = None

    def __init__(self, runner: Runner, turns: Turns) -> None:
        self._runner = runner
        self._turns = turns

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._runner, name)

    def run(self, batch: Batch) -> StepOutput:
        with self._turns:
            return self._runner.run(batch)


class _LaunchedInTurns(_InTurns):
    """The same for a runner that launches steps ahead: the device computes them in that order."""

    _runner: OverlappedRunner

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        with self._turns:
            return self._runner.launch(batch, unread_T=unread_T)

    def run(self, batch: Batch) -> StepOutput:
        return self._runner.collect(self.launch(batch))


def encode_in_turns(runner: EncodingRunner, turns: Turns) -> EncodingRunner:
    """The same for a runner that encodes."""
    return _EncodesInTurns(runner, turns)


class _EncodesInTurns:
    """An encoding runner in turns with others."""

    def __init__(self, runner: EncodingRunner, turns: Turns) -> None:
        self.info = runner.info
        self.numeric_class = runner.numeric_class
        self.fingerprint = runner.fingerprint
        self._runner = runner
        self._turns = turns
        self.warm_up = runner.warm_up
        self.close = runner.close

    def encode(self, batch: Sequence[Encoding]) -> list[Floats]:
        with self._turns:
            return self._runner.encode(batch)
