"""EncodingLoop: whatever a step packs, each request gets the results of its inputs, in order."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from model.runners.encoding import Encoding
from service.engine.encoding import EncodingLoop, split
from service.engine.inbox import Work
from service.engine.observer import Observer, StepReport
from service.engine.plan import EngineConfig
from service.messages import (
    EncodingInputs,
    End,
    Event,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Tokens,
    rolling_digest,
)
from service.vectors import from_text
from tests.support.encoders import (
    VOCAB_SIZE,
    WIDTH,
    HashEncoder,
    encoding_request,
    ids_of_results,
    info_of,
    result_of,
)

Inputs = list[list[int]]


class Reports(Observer):
    def __init__(self) -> None:
        self.steps: list[StepReport] = []

    def stepped(self, report: StepReport) -> None:
        self.steps.append(report)


class Bench:
    """A loop that is driven step by step, without its thread, on a clock of its own."""

    def __init__(
        self, *, max_tokens: int = 64, seconds_per_token: float = 0.0, target_gap: float = 1.0
    ) -> None:
        self.now = 0.0
        self.events: dict[str, list[Event]] = {}
        self.reports = Reports()

        def take_time(batch: Sequence[Encoding]) -> None:
            self.now += seconds_per_token * sum(len(each.ids) for each in batch)

        self.runner = HashEncoder(info_of(max_tokens=64), on_encode=take_time)
        self.loop = EncodingLoop(
            self.runner,
            config=EngineConfig(
                max_batch_tokens=max_tokens, max_sequences=8, target_gap=target_gap
            ),
            deliver=self._deliver,
            observer=self.reports,
            clock=lambda: self.now,
        )

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            self.events.setdefault(event.request_id, []).append(event)

    def add(self, request: GenerationRequest, tokens: tuple[int, ...] = ()) -> None:
        remaining = request.timeout_ms
        self.loop.add(Work(request=request, tokens=tokens, remaining_ms=remaining))

    def step(self) -> bool:
        computed = self.loop._advance()
        self.loop._flush()
        return computed

    def run(self) -> None:
        while self.step():
            pass

    def records(self, request_id: str) -> list[Tokens]:
        events = self.events.get(request_id, [])
        return [each.record for each in events if isinstance(each.record, Tokens)]

    def end(self, request_id: str) -> End:
        last = self.events[request_id][-1].record
        assert isinstance(last, End)
        return last


def drawn_inputs(draw: random.Random, *, most: int = 9, longest: int = 20) -> Inputs:
    return [
        [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, longest))]
        for _ in range(draw.randint(1, most))
    ]


def check_answer(bench: Bench, request_id: str, inputs: Inputs, *, begun: int = 0) -> None:
    """The journal after `begun` results: without gaps, with the digest of all, and one end."""
    count, ids = begun, ids_of_results(inputs)
    for record in bench.records(request_id):
        assert record.start == count
        rows = from_text(record.text, count=len(record.ids))
        for row, given in zip(rows, inputs[count:], strict=False):
            assert row.tobytes() == result_of(given, width=WIDTH).tobytes()
        count += len(record.ids)
        assert record.ids == ids[record.start : count]
        assert record.digest == rolling_digest(ids[:count])
    end = bench.end(request_id)
    assert (end.count, end.reason) == (len(inputs), FinishReason.STOP)
    assert count == len(inputs)


@pytest.mark.parametrize("seed", range(20))
def test_each_request_gets_its_results_whatever_comes_when(seed: int) -> None:
    """Requests come between steps, some of them begun by another engine, some aborted."""
    draw = random.Random(seed)
    bench = Bench(
        max_tokens=draw.choice([8, 24, 64]), seconds_per_token=draw.choice([0.0, 0.001, 0.01])
    )
    asked: dict[str, tuple[Inputs, int]] = {}
    aborted = set()
    for number in range(12):
        inputs = drawn_inputs(draw)
        begun = draw.randint(0, len(inputs)) if draw.random() < 0.3 else 0
        request = encoding_request(
            f"r{number}", inputs, tenant=draw.choice("abc"), priority=draw.randrange(3)
        )
        bench.add(request, ids_of_results(inputs)[:begun])
        asked[request.id] = inputs, begun
        for _ in range(draw.randrange(3)):
            bench.step()
        if draw.random() < 0.2:
            bench.loop.abort(request.id)
            aborted.add(request.id)
    bench.run()
    assert not bench.loop.busy
    assert bench.loop._num_left == 0
    for request_id, (inputs, begun) in asked.items():
        if request_id not in aborted:
            check_answer(bench, request_id, inputs, begun=begun)
    assert bench.loop.room == 8


def test_an_answer_that_only_lacks_its_end_gets_it() -> None:
    bench, inputs = Bench(), [[1, 2], [3]]
    bench.add(encoding_request("r", inputs), ids_of_results(inputs))
    bench.run()
    assert bench.runner.steps == []
    assert bench.end("r").count == 2


@pytest.mark.parametrize("seconds_per_token", [0.0, 0.001])
def test_a_step_keeps_to_its_limits_unless_an_input_alone_exceeds_them(
    seconds_per_token: float,
) -> None:
    """The limit of time holds once steps of two sizes were measured; those before are small."""
    draw = random.Random(5)
    bench = Bench(max_tokens=60, seconds_per_token=seconds_per_token, target_gap=0.03)
    for number in range(30):
        bench.add(encoding_request(f"r{number}", drawn_inputs(draw, longest=64)))
    bench.run()
    sizes = [[len(each.ids) for each in step] for step in bench.runner.steps]
    assert any(len(step) > 1 for step in sizes)
    assert all(sum(step) <= 60 or len(step) == 1 for step in sizes)
    if seconds_per_token:
        late = sizes[len(sizes) // 2 :]
        assert all(sum(step) <= 30 * 1.1 or len(step) == 1 for step in late)


def test_tenants_take_turns_input_by_input() -> None:
    """A tenant with one input waits for one step of another's long request, not for its end."""
    bench = Bench(max_tokens=8)
    bench.add(encoding_request("long", [[1] * 4] * 50, tenant="a"))
    bench.step()
    bench.add(encoding_request("short", [[2] * 4], tenant="b"))
    bench.step()
    assert bench.end("short").reason is FinishReason.STOP
    assert sum(len(record.ids) for record in bench.records("long")) <= 4


def test_higher_priorities_go_first() -> None:
    bench = Bench(max_tokens=8)
    bench.add(encoding_request("low", [[1] * 4] * 4, priority=2))
    bench.add(encoding_request("high", [[2] * 4] * 2, priority=0))
    bench.step()
    assert bench.end("high").count == 2
    assert bench.records("low") == []


def test_a_deadline_ends_what_is_not_computed() -> None:
    bench = Bench(max_tokens=8, seconds_per_token=0.01)
    bench.add(encoding_request("r", [[1] * 8] * 4, timeout_ms=100))
    bench.run()
    end = bench.end("r")
    assert end.reason is FinishReason.DEADLINE
    assert end.count == sum(len(record.ids) for record in bench.records("r")) < 4
    assert not bench.loop.busy


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (encoding_request("r", [[VOCAB_SIZE]]), "invalid_token_id"),
        (encoding_request("r", [[-1]]), "invalid_token_id"),
        (encoding_request("r", [[1] * 65]), "context_length_exceeded"),
        (encoding_request("r", [[1], []]), "context_length_exceeded"),
        (
            GenerationRequest(
                id="r", prompt_ids=(1,), sampling=SamplingParams(seed=0), max_tokens=1
            ),
            "unsupported_model",
        ),
        (
            GenerationRequest(
                id="r",
                prompt_ids=(1,),
                sampling=SamplingParams(seed=0),
                max_tokens=1,
                encoding=EncodingInputs(lengths=(2,)),
            ),
            "invalid_value",
        ),
    ],
)
def test_what_would_break_the_runner_ends_with_an_error(
    request_: GenerationRequest, code: str
) -> None:
    bench = Bench()
    bench.add(request_)
    bench.run()
    end = bench.end("r")
    assert (end.reason, end.error) == (FinishReason.ERROR, code)
    assert bench.runner.steps == []


def test_pairs_have_types() -> None:
    inputs = EncodingInputs(lengths=(3, 2), firsts=(1, 2))
    first, second = split((5, 6, 7, 8, 9), inputs)
    assert (first.ids, first.types) == ((5, 6, 7), (0, 1, 1))
    assert (second.ids, second.types) == ((8, 9), None)


def test_beyond_two_steps_of_work_there_is_no_room_but_for_under_served_tenants() -> None:
    bench = Bench(max_tokens=8)
    assert bench.loop.room == 8
    bench.add(encoding_request("r", [[1] * 4] * 20))
    bench.step()
    assert bench.loop.room == 0
    assert bench.loop.under_served_room == 4
    bench.run()
    assert bench.loop.room == 8


def test_a_report_counts_inputs_and_tokens() -> None:
    bench = Bench()
    bench.add(encoding_request("r", [[1, 2], [3]]))
    bench.run()
    report = next(each for each in bench.reports.steps if each.num_tokens)
    assert (report.num_tokens, report.num_encoded, report.prompt_tokens) == (3, 2, 3)
    assert report.num_sampled == 0
