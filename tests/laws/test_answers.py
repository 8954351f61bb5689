"""The laws of an answer, over the real engine and the real network with tiny random weights.

An answer is a function of its request alone: not of what else is in the batch, not of how its
prompt was cut, not of what was cached, preempted or served first. Tokens must be equal, log probs
within 1e-4: the torch runner rounds differently for different shapes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from model.config import ModelConfig
from model.runners import RunnerOptions
from model.runners.torch import TorchRunner
from service.engine.cost import CostModel, StepWork
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer, StepReport
from service.engine.plan import EngineConfig
from service.messages import End, Event, FinishReason, GenerationRequest, SamplingParams, Tokens
from tests.support.builders import at_length, slowly, tiny_model_config, tiny_weights

BYTES = tuple(bytes([byte]) for byte in range(97))
TOLERANCE = 1e-4


@dataclass
class Answers(Observer):
    """Runs an engine to its end and collects what it delivered."""

    config: EngineConfig
    blocks: int = 256
    model: ModelConfig = field(
        default_factory=lambda: tiny_model_config(vocab_size=97, max_model_len=96)
    )
    exact: bool = False  # what the runner is made to claim; only then are drafts allowed
    records: dict[str, list[Tokens]] = field(default_factory=dict)
    ends: dict[str, End] = field(default_factory=dict)
    preemptions: int = 0
    prefix_hits: int = 0
    drafts: int = 0
    accepted: int = 0

    def stepped(self, report: StepReport) -> None:
        self.preemptions += report.preemptions
        self.prefix_hits += report.prefix_hit_tokens
        self.drafts += report.num_drafts
        self.accepted += report.num_accepted

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event.record, End):
                assert event.request_id not in self.ends
                self.ends[event.request_id] = event.record
            else:
                assert event.request_id not in self.ends
                self.records.setdefault(event.request_id, []).append(event.record)

    def run(self, rounds: Sequence[Sequence[Work]]) -> Answers:
        """Hands each round in when the one before has begun to run."""
        runner = TorchRunner(
            self.model,
            tiny_weights(self.model, seed=1),
            options=RunnerOptions(dtype="float32", block_size=4, num_blocks=self.blocks),
            digest="tiny",
        )
        runner.exact = self.exact
        loop = EngineLoop(
            runner,
            cost=FreeRows() if self.exact else None,
            config=self.config,
            token_bytes=BYTES,
            eos_ids=frozenset({96}),
            deliver=self.take,
            observer=self,
        )
        for works in rounds:
            for work in works:
                loop.add(work)
            loop.step()
        while loop.step():
            loop.check_integrity()
        loop.check_integrity()
        assert not loop.busy
        return self

    def ids(self, name: str) -> list[int]:
        return [token for record in self.records.get(name, []) for token in record.ids]

    def text(self, name: str) -> str:
        return "".join(record.text for record in self.records.get(name, []))

    def logprobs(self, name: str) -> list[float]:
        return [entry.logprob for record in self.records[name] for entry in record.logprobs]


class FreeRows(CostModel):
    """Rows cost next to nothing, whatever a clock says: as many drafts as there are."""

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns nothing."""

    def seconds(self, work: StepWork) -> float:
        """All but the same for any step."""
        return 0.01 + work.tokens * 1e-6


def model_config() -> ModelConfig:
    return tiny_model_config(vocab_size=97, max_model_len=96)


def make_requests(seed: int, *, count: int = 9) -> list[GenerationRequest]:
    """Greedy and sampled, with penalties, stops and shared beginnings."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        shared = [5, 6, 7, 8, 9, 10, 11, 12] * draw.choice([0, 1, 2])
        made.append(
            GenerationRequest(
                id=f"r{index}",
                prompt_ids=(*shared, *(draw.randrange(96) for _ in range(draw.randint(1, 20)))),
                max_tokens=draw.randint(1, 24),
                sampling=SamplingParams(
                    seed=draw.randrange(2**64),
                    temperature=draw.choice([0.0, 0.0, 0.8, 1.5]),
                    top_k=draw.choice([None, 5]),
                    top_p=draw.choice([1.0, 0.9]),
                    repetition_penalty=draw.choice([1.0, 1.2]),
                    frequency_penalty=draw.choice([0.0, 0.5]),
                    banned=draw.choice([(), tuple((t, t) for t in range(0, 96, 2)), ((7,), (9,))]),
                    allowed=draw.choice([(), (), tuple(range(index, 97, 3))]),
                    top_logprobs=2,
                ),
                stop=tuple(draw.sample(["A", "bc", "z"], draw.choice([0, 1]))),
                ignore_eos=draw.random() < 0.5,
                priority=draw.randrange(3),
                tenant=draw.choice(["a", "b"]),
            )
        )
    return made


ROOMY = EngineConfig(max_batch_tokens=256, max_sequences=16, max_prompt_chunk=256)


def alone(requests: Sequence[GenerationRequest]) -> Answers:
    """Each request by itself, whole prompt at once, nothing cached: the answer by definition."""
    config = replace(ROOMY, prefix_cache=False)
    together = Answers(config)
    for request in requests:
        one = Answers(config).run([[Work(request=request)]])
        together.records |= one.records
        together.ends |= one.ends
    return together


def assert_same(found: Answers, expected: Answers, requests: Sequence[GenerationRequest]) -> None:
    for request in requests:
        name = request.id
        assert found.ids(name) == expected.ids(name)
        assert found.text(name) == expected.text(name)
        assert found.logprobs(name) == pytest.approx(expected.logprobs(name), abs=TOLERANCE)
        ours, theirs = found.ends[name], expected.ends[name]
        assert (ours.count, ours.reason, ours.stopped_by) == (
            theirs.count, theirs.reason, theirs.stopped_by,
        )  # fmt: skip
        assert ours.reason in {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *at_length(1, 2)])
def test_a_batch_equals_singles(seed: int) -> None:
    requests = make_requests(seed)
    batch = Answers(ROOMY).run([[Work(request=request) for request in requests]])
    assert_same(batch, alone(requests), requests)


@pytest.mark.parametrize("chunk", [3, *slowly(1, 7)])
def test_a_chunked_prompt_equals_a_whole_one(chunk: int) -> None:
    requests = make_requests(10 + chunk)
    config = EngineConfig(max_batch_tokens=16, max_sequences=16, max_prompt_chunk=chunk)
    chunked = Answers(config).run([[Work(request=request)] for request in requests])
    assert_same(chunked, alone(requests), requests)


def test_a_prefix_hit_equals_a_miss() -> None:
    prompt = tuple(range(20, 50))
    requests = [
        replace(request, prompt_ids=(*prompt, index), tenant="a", prompt_logprobs=None)
        for index, request in enumerate(make_requests(20, count=6))
    ]
    warm = Answers(ROOMY).run(
        [[Work(request=replace(requests[0], id="first"))], *[[Work(request=r)] for r in requests]]
    )
    assert warm.prefix_hits >= 28 * len(requests)
    assert_same(warm, alone(requests), requests)


def test_a_prefix_hit_never_crosses_tenants() -> None:
    request = replace(make_requests(21)[0], prompt_ids=tuple(range(20, 50)), tenant="a")
    other = replace(request, id="other", tenant="b")
    answers = Answers(ROOMY).run([[Work(request=request)], [Work(request=other)]])
    assert answers.prefix_hits == 0
    assert answers.ids("other") == answers.ids(request.id)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [30, *at_length(31)])
def test_a_preempted_answer_equals_an_undisturbed_one(seed: int) -> None:
    requests = [replace(r, max_tokens=24, ignore_eos=True, stop=()) for r in make_requests(seed)]
    tight = Answers(ROOMY, blocks=26).run([[Work(request=request) for request in requests]])
    assert tight.preemptions > 0
    assert_same(tight, alone(requests), requests)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [40, *at_length(41)])
def test_order_and_priority_change_no_answer(seed: int) -> None:
    requests = make_requests(seed)
    draw = random.Random(seed)
    shuffled = [replace(r, priority=draw.randrange(3)) for r in requests]
    draw.shuffle(shuffled)
    config = EngineConfig(max_batch_tokens=24, max_sequences=3, max_prompt_chunk=8)
    answers = Answers(config).run([[Work(request=request)] for request in shuffled])
    assert_same(answers, alone(requests), requests)


@pytest.mark.slow
@pytest.mark.parametrize("taken", [4, *at_length(1, 9)])
def test_a_take_over_continues_the_undisturbed_answer(taken: int) -> None:
    requests = [replace(r, max_tokens=16, ignore_eos=True, stop=()) for r in make_requests(50)]
    expected = alone(requests)
    works = [
        Work(request=request, tokens=tuple(expected.ids(request.id)[:taken]))
        for request in requests
    ]
    resumed = Answers(ROOMY).run([works])
    for request in requests:
        assert resumed.ids(request.id) == expected.ids(request.id)[taken:]
        assert resumed.records[request.id][0].start == taken
        assert resumed.records[request.id][-1].digest == expected.records[request.id][-1].digest


def self_repeating(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    """With three words only a network of random weights soon goes round in circles, and leaves
    them again: drafts come true and fail.
    """
    return [
        replace(
            request,
            prompt_ids=request.prompt_ids[:12] * 2,
            max_tokens=40,
            ignore_eos=True,
            sampling=replace(
                request.sampling,
                temperature=0.2 * (n % 3),
                repetition_penalty=1.0,
                frequency_penalty=0.05 * (n % 2),
                logit_bias=tuple((token, 100.0) for token in (3, 5, 7)),
            ),
        )
        for n, request in enumerate(requests)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [60, *at_length(61)])
def test_predictions_change_no_answer(seed: int) -> None:
    """Right ones, wrong ones, and those with a part missing or added; right ones save steps."""
    draw = random.Random(seed)
    requests = make_requests(seed)
    truth = alone(requests)
    predicted = []
    for request in requests:
        ids = truth.ids(request.id)
        cut = draw.randrange(len(ids))
        wrong = tuple(draw.randrange(97) for _ in range(5))
        text = draw.choice([ids, ids[:cut] + list(wrong) + ids[cut:], ids[cut:], list(wrong)])
        predicted.append(replace(request, prediction=tuple(text)))
    drafted = Answers(ROOMY, blocks=120, exact=True).run(
        [[Work(request=request)] for request in predicted]
    )
    assert drafted.accepted >= 15
    assert_same(drafted, truth, requests)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [60, *at_length(61)])
def test_drafts_change_no_answer(seed: int) -> None:
    requests = self_repeating(make_requests(seed))
    drafted = Answers(ROOMY, blocks=80, exact=True).run(
        [[Work(request=request)] for request in requests]
    )
    assert drafted.accepted >= 30
    assert drafted.drafts >= drafted.accepted + 30
    assert_same(drafted, alone(requests), requests)
