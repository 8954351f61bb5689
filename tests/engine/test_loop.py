"""EngineLoop in its own thread: what other threads see of it."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from model.batch import Batch
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer, StepReport
from service.messages import End, Event, GenerationRequest
from tests.engine.harness import CONFIG, Transcript, expected, make_request, random_request
from tests.support.fakes import (
    EOS_IDS,
    TOKEN_BYTES,
    VISIBLE_BYTES,
    OracleRunner,
    OverlappedOracle,
)
from tests.support.waiting import PATIENCE

WAIT = PATIENCE  # seconds; only a failure waits that long


class Outbox:
    """Collects what is delivered; `until_end` waits for the terminal record of a request."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.transcripts: dict[str, Transcript] = {}

    def deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            self.events.put(event)

    def until_end(self, request_id: str) -> Transcript:
        while True:
            transcript = self.transcripts.setdefault(request_id, Transcript())
            if transcript.end is not None:
                return transcript
            event = self.events.get(timeout=WAIT)
            self.transcripts.setdefault(event.request_id, Transcript()).read(event.record)


class AbortAfter:
    """Aborts the request "r" when the given number of steps were read."""

    def __init__(self, steps: int) -> None:
        self.loop: EngineLoop | None = None
        self._left = steps

    def stepped(self, report: StepReport) -> None:
        self._left -= 1
        if self._left == 0 and self.loop is not None:
            self.loop.abort("r")


Build = Callable[..., tuple[EngineLoop, Outbox]]


@pytest.fixture(params=[OracleRunner, OverlappedOracle], ids=["", "overlapped"])
def build(request: pytest.FixtureRequest) -> Iterator[Build]:
    """Makes engines and stops them at the end."""
    loops: list[EngineLoop] = []

    def make(
        *, on_run: Callable[[Batch], None] | None = None, **fields: Any
    ) -> tuple[EngineLoop, Outbox]:
        outbox = Outbox()
        loop = EngineLoop(
            request.param(on_run=on_run),
            **{
                "config": CONFIG,
                "token_bytes": TOKEN_BYTES,
                "visible_bytes": VISIBLE_BYTES,
                "eos_ids": EOS_IDS,
                "deliver": outbox.deliver,
                "observer": Observer(),
                **fields,
            },
        )
        loops.append(loop)
        return loop, outbox

    yield make
    for loop in loops:
        loop.stop(WAIT)
        assert not loop._thread.is_alive()


def test_requests_from_many_threads_are_answered(build: Build) -> None:
    loop, outbox = build()
    loop.start()
    requests = [random_request(random.Random(seed), f"r{seed}") for seed in range(24)]

    def add_all(part: list[GenerationRequest]) -> None:
        for request in part:
            loop.add(Work(request=request))

    parts = (requests[:8], requests[8:16], requests[16:])
    threads = [threading.Thread(target=add_all, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for request in requests:
        assert outbox.until_end(request.id).result == expected(request)
    for thread in threads:
        thread.join()


def test_an_idle_engine_sleeps_and_wakes(build: Build) -> None:
    """The clock is read a bounded number of times while nothing happens: no polling."""
    readings = 0

    def clock() -> float:
        nonlocal readings
        readings += 1
        return 0.0

    loop, outbox = build(clock=clock)
    loop.start()
    request = make_request()
    loop.add(Work(request=request))
    outbox.until_end("r")
    before = readings
    threading.Event().wait(0.15)
    assert readings - before <= 4, "the end of the step, and no more"
    assert not loop.busy
    assert loop.steps == len(expected(request)[0])
    loop.add(Work(request=make_request("again")))
    assert outbox.until_end("again").result == expected(request)


def test_a_broken_runner_ends_the_thread_and_is_told_once(build: Build) -> None:
    told: list[BaseException] = []
    ended = threading.Event()

    def broken(batch: Batch) -> None:
        if not batch.is_decode:
            return
        raise RuntimeError("device lost")

    def on_failure(failure: BaseException) -> None:
        told.append(failure)
        ended.set()

    loop, outbox = build(on_run=broken, on_failure=on_failure)
    loop.start()
    loop.add(Work(request=make_request()))
    assert ended.wait(WAIT)
    loop.stop(WAIT)
    assert told == [loop.failure]
    assert isinstance(loop.failure, RuntimeError)
    records = [outbox.events.get().record for _ in range(outbox.events.qsize())]
    assert len(records) <= 1, "the token of the previous step, if it had been read"
    assert not any(isinstance(record, End) for record in records)


def test_stop_finishes_the_step_and_leaves_the_rest_unfinished(build: Build) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def held_up(_batch: Batch) -> None:
        entered.set()
        assert go_on.wait(WAIT)

    loop, outbox = build(on_run=held_up)
    loop.start()
    loop.add(Work(request=make_request(max_tokens=30, ignore_eos=True)))
    assert entered.wait(WAIT)
    stopping = threading.Thread(target=loop.stop, args=(WAIT,))
    stopping.start()
    while not loop._inbox.stopping:
        threading.Event().wait(0.001)
    go_on.set()
    stopping.join()
    records = [outbox.events.get().record for _ in range(outbox.events.qsize())]
    assert len(records) == 1
    assert not isinstance(records[0], End)
    assert loop.busy
    assert loop.failure is None


@pytest.mark.slow
def test_nothing_comes_out_after_abort_returned(build: Build) -> None:
    """Aborted from another thread at any moment; an event after that would be seen."""
    delivered: list[str] = []
    loop, _ = build(deliver=lambda events: delivered.extend(e.request_id for e in events))
    loop.start()
    for index in range(200):
        name = f"r{index}"
        loop.add(Work(request=make_request(name, max_tokens=30, ignore_eos=True)))
        threading.Event().wait(0.0005 * (index % 3))
        while index % 5 == 0 and name not in delivered:
            threading.Event().wait(0.0005)
        loop.abort(name)
        seen = delivered.count(name)
        threading.Event().wait(0.0005)
        assert delivered.count(name) == seen
    assert len(delivered) >= 40, "some were answered in part"


def test_no_record_is_held_back_across_an_abort(build: Build) -> None:
    """Aborted when a step was read and its records were not delivered yet: they never are."""
    observer = AbortAfter(3)
    loop, outbox = build(observer=observer)
    observer.loop = loop
    loop.add(Work(request=make_request(max_tokens=30, ignore_eos=True)))
    loop.add(Work(request=make_request("other")))
    loop.start()
    assert outbox.until_end("other").result == expected(make_request("other"))
    while loop.busy:
        threading.Event().wait(0.001)
    assert len(outbox.transcripts["r"].ids) < 3


def test_a_token_is_delivered_before_the_next_step_is_computed() -> None:
    """Its consumer works while the runner computes, not after it."""
    delivered: list[Event] = []
    seen: list[int] = []
    ended = threading.Event()

    def deliver(events: Sequence[Event]) -> None:
        delivered.extend(events)
        if any(isinstance(event.record, End) for event in events):
            ended.set()

    loop = EngineLoop(
        OracleRunner(on_run=lambda _: seen.append(len(delivered))),
        config=CONFIG,
        token_bytes=TOKEN_BYTES,
        eos_ids=EOS_IDS,
        deliver=deliver,
        observer=Observer(),
    )
    loop.start()
    loop.add(Work(request=make_request(max_tokens=10, ignore_eos=True)))
    assert ended.wait(WAIT)
    loop.stop(WAIT)
    assert len(seen) == 10
    assert seen == list(range(10))


def test_an_engine_that_never_started_stops(build: Build) -> None:
    loop, _ = build()
    loop.stop(WAIT)
