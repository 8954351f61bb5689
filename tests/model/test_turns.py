"""Turns: one step at a time, in the order of the calls, and nothing else changes."""

from __future__ import annotations

import threading
from typing import Any, cast

from model.batch import Batch, StepOutput
from model.runners import Runner, overlapped
from model.runners.turns import Turns, take_turns
from tests.support.fakes import OracleRunner, OverlappedOracle
from tests.support.waiting import PATIENCE

BATCH = cast("Batch", "a step")


class HeldRunner:
    """Computes a step when the test lets it; records who computes."""

    num_blocks = 7

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        self.let = threading.Semaphore(0)
        self.began = threading.Semaphore(0)

    def run(self, _batch: Batch) -> StepOutput:
        self.log.append(f"{self.name} begins")
        self.began.release()
        assert self.let.acquire(timeout=PATIENCE)
        self.log.append(f"{self.name} ends")
        return cast("StepOutput", self.name)


def test_steps_do_not_overlap_and_no_runner_is_overtaken_twice() -> None:
    """Each has many steps to compute; whoever waits is next."""
    log: list[str] = []
    turns = Turns()
    runners = [HeldRunner(name, log) for name in "ab"]
    both = [take_turns(cast("Runner", runner), turns) for runner in runners]
    threads = [
        threading.Thread(target=lambda each=each: [each.run(BATCH) for _ in range(20)])
        for each in both
    ]
    threads[0].start()
    assert runners[0].began.acquire(timeout=PATIENCE)
    threads[1].start()
    while not turns._waiting:
        pass  # the second one waits for its first turn
    for runner in runners:
        for _ in range(20):
            runner.let.release()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    for begins, ends in zip(log[::2], log[1::2], strict=True):
        assert (begins, ends) == (f"{begins[0]} begins", f"{begins[0]} ends")
    assert log[2] == "b begins", "the first runner came again before the one that waited"
    assert sorted(log[::2]) == ["a begins"] * 20 + ["b begins"] * 20


def test_an_error_ends_the_turn() -> None:
    turns = Turns()

    class Broken(HeldRunner):
        def run(self, _batch: Batch) -> StepOutput:
            raise ValueError("broken")

    log: list[str] = []
    broken = take_turns(cast("Runner", Broken("a", log)), turns)
    for _ in range(2):
        try:
            broken.run(BATCH)
        except ValueError:
            log.append("raised")
    assert log == ["raised", "raised"]


def test_everything_else_is_the_runners_own() -> None:
    plain, ahead = OracleRunner(), OverlappedOracle()
    for runner in (plain, ahead):
        taking: Any = take_turns(cast("Runner", runner), Turns())
        assert taking.num_blocks == runner.num_blocks
        assert taking.exact is runner.exact
        assert (overlapped(taking) is None) == (overlapped(cast("Runner", runner)) is None)
