"""The laws of an answer with a grammar: it matches, and it is a function of its request alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jsonschema
import pytest

from model.grammar import (
    Grammars,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from model.runners import Runner, RunnerOptions
from model.runners.torch import TorchRunner
from service.engine.cost import CostModel, StepWork
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer, StepReport
from service.engine.plan import EngineConfig
from service.messages import End, Event, FinishReason, GenerationRequest, SamplingParams
from tests.laws.noise import ENDINGS, EOS_IDS, TOKEN_BYTES, VOCAB_SIZE, NoiseRunner
from tests.laws.random_schemas import random_schema
from tests.support.builders import tiny_model_config, tiny_weights
from tests.support.fakes import Deferring, Overlapping

ROOMY = EngineConfig(max_batch_tokens=512, max_sequences=64, max_prompt_chunk=512)
BIAS = tuple((token, 2.5) for token, text in enumerate(TOKEN_BYTES) if text in ENDINGS)


class FreeRows(CostModel):
    """Rows cost next to nothing, whatever a clock says: as many drafts as there are."""

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns nothing."""

    def seconds(self, work: StepWork) -> float:
        """All but the same for any step."""
        return 0.01 + work.tokens * 1e-6


class OverlappedNoise(Overlapping, NoiseRunner):
    """Noise, one step ahead."""


class DeferringNoise(Deferring, NoiseRunner):
    """Noise that is sampled later than it is launched."""


@dataclass
class Engine(Observer):
    """Runs requests to their ends, and keeps what came out."""

    grammars: Grammars
    config: EngineConfig = ROOMY
    runner: Runner = field(default_factory=NoiseRunner)
    drafting: bool = False
    token_bytes: Sequence[bytes] = TOKEN_BYTES
    ids: dict[str, list[int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    ends: dict[str, End] = field(default_factory=dict)
    drafts: int = 0
    accepted: int = 0
    preempted: int = 0
    skipped: int = 0

    def stepped(self, report: StepReport) -> None:
        self.drafts += report.num_drafts
        self.accepted += report.num_accepted
        self.preempted += len(report.preempted)
        self.skipped += report.num_skipped

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event.record, End):
                self.ends[event.request_id] = event.record
            else:
                self.ids[event.request_id] += event.record.ids
                self.texts[event.request_id] += event.record.text

    def run(self, *works: Work | GenerationRequest) -> Engine:
        loop = self.loop()
        self.add(loop, *works)
        return self.finish(loop)

    def loop(self) -> EngineLoop:
        return EngineLoop(
            self.runner,
            config=replace(self.config, speculate=self.drafting),
            cost=FreeRows(),
            token_bytes=self.token_bytes,
            eos_ids=EOS_IDS,
            deliver=self.take,
            observer=self,
            grammars=self.grammars,
        )

    def add(self, loop: EngineLoop, *works: Work | GenerationRequest) -> None:
        for item in works:
            work = item if isinstance(item, Work) else Work(request=item)
            self.ids[work.request.id], self.texts[work.request.id] = [], ""
            loop.add(work)

    def finish(self, loop: EngineLoop) -> Engine:
        while loop.step():
            loop.check_integrity()
        loop.check_integrity()
        assert not loop.busy
        return self

    def result(self, name: str) -> tuple[list[int], str, FinishReason, str | int | None]:
        return self.ids[name], self.texts[name], self.ends[name].reason, self.ends[name].stopped_by


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=VOCAB_SIZE, kept=512)


def request(name: str, grammar: str | None, **fields: object) -> GenerationRequest:
    sampling = {"seed": 5, "logit_bias": BIAS, **fields}
    max_tokens = sampling.pop("max_tokens", 120)
    return GenerationRequest(
        id=name,
        prompt_ids=(*b"tell: ", *name.encode()),
        max_tokens=int(str(max_tokens)),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]  # fields by name
        grammar=grammar,
    )


OBJECT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["fixed", "free"]},
        "tags": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}


def some_requests(seed: int) -> list[GenerationRequest]:
    """Greedy and sampled, with penalties, with every kind of grammar and without."""
    draw = random.Random(seed)
    notations = [
        json_schema_grammar(OBJECT),
        json_schema_grammar(OBJECT),
        json_schema_grammar(random_schema(seed)),
        json_object_grammar(),
        regex_grammar("(the )?[a-f]{3,9}[0-9]{2}"),
        choice_grammar(["fixed", "fix", "free", "nothing"]),
        lark_grammar('start: "(" start ")" | "x" | "12"'),
        None,
    ]
    return [
        request(
            f"r{index}",
            notation,
            seed=draw.randrange(2**64),
            temperature=draw.choice([0.0, 0.7, 1.0, 1.5]),
            top_k=draw.choice([None, 20]),
            frequency_penalty=draw.choice([0.0, 0.4]),
            repetition_penalty=draw.choice([1.0, 1.2]),
            max_tokens=60,
        )
        for index, notation in enumerate(notations)
    ]


def alone(engine: Callable[[], Engine], requests: Sequence[GenerationRequest]) -> Engine:
    """Each request by itself, in an engine of its own without drafts: the answer by definition."""
    whole = engine()
    for one in requests:
        answer = engine().run(one)
        whole.ids |= answer.ids
        whole.texts |= answer.texts
        whole.ends |= answer.ends
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_neither_company_nor_drafts_nor_chunks_change_an_answer(
    grammars: Grammars, seed: int
) -> None:
    requests = some_requests(seed)
    expected = alone(partial(Engine, grammars), requests)
    narrow = EngineConfig(max_batch_tokens=16, max_sequences=3, max_prompt_chunk=5)
    engines = [
        Engine(grammars),
        Engine(grammars, drafting=True),
        Engine(grammars, config=narrow, drafting=True),
    ]
    for engine in engines:
        engine.run(*requests)
        for one in requests:
            assert engine.result(one.id) == expected.result(one.id)
    assert not engines[0].drafts
    assert min(engine.accepted for engine in engines[1:]) > 10
    assert min(engine.drafts - engine.accepted for engine in engines[1:]) > 10
    assert {end.reason for end in expected.ends.values()} <= {
        FinishReason.STOP,
        FinishReason.LENGTH,
    }


@pytest.mark.slow
def test_steps_launched_ahead_change_no_answer(grammars: Grammars) -> None:
    """A mask is a function of the token before: it is read first, and others wait with it."""
    requests = [
        request("mask", json_schema_grammar(OBJECT), max_tokens=20),
        replace(request("none", None, max_tokens=90), ignore_eos=True),
        request("late", choice_grammar(["fixed", "free"]), temperature=0.0),
    ]
    runner = OverlappedNoise()
    engine = Engine(grammars, runner=runner).run(*requests)
    expected = alone(partial(Engine, grammars), requests)
    assert runner.most_ahead == 2
    assert [engine.result(r.id) for r in requests] == [expected.result(r.id) for r in requests]


@pytest.mark.slow
@pytest.mark.parametrize("drafting", [False, True])
def test_masks_made_beside_a_step_change_no_answer(grammars: Grammars, drafting: bool) -> None:
    """Every kind of grammar, also where the host chooses the token, in batches of any size."""
    deferred = accepted = preempted = 0
    for seed in range(3):
        requests = some_requests(seed)
        requests += [request(f"more {n}", json_object_grammar(), seed=n) for n in range(3 * seed)]
        expected = alone(partial(Engine, grammars), requests)
        runner = DeferringNoise(keeps_logits=seed > 0, num_blocks=1024 if seed < 2 else 36)
        engine = Engine(grammars, runner=runner, drafting=drafting).run(*requests)
        for each in requests:
            assert engine.result(each.id) == expected.result(each.id)
        deferred += runner.num_deferred
        accepted += engine.accepted
        preempted += engine.preempted
    assert deferred > 20
    assert (accepted > 10) is drafting
    assert preempted


@pytest.mark.parametrize(
    ("guided", "others", "temperature", "are_read"),
    [
        (3, 0, 1.0, True), (4, 0, 1.0, False), (1, 1, 1.0, False),
        (11, 0, 0.0, True), (12, 0, 0.0, False), (2, 2, 0.0, True), (1, 3, 0.0, False),
    ],
)  # fmt: skip
def test_few_are_read_first_for_drafts_that_grammars_force(
    grammars: Grammars, guided: int, others: int, temperature: float, are_read: bool
) -> None:
    """And not if many others would wait for that."""
    fields = {"temperature": temperature, "logit_bias": (), "max_tokens": 30}
    requests = [request(f"r{n}", json_schema_grammar(OBJECT), **fields) for n in range(guided)]
    requests += [request(f"plain {n}", None, max_tokens=40) for n in range(others)]
    runner = DeferringNoise(keeps_logits=True)
    Engine(grammars, runner=runner, drafting=True).run(*requests)
    assert (runner.num_deferred == 0) is are_read


def test_drafts_change_no_answer(grammars: Grammars) -> None:
    requests = [request(f"r{n}", json_schema_grammar(OBJECT), seed=n) for n in range(2)]
    plain = Engine(grammars).run(*requests)
    drafted = Engine(grammars, drafting=True).run(*requests)
    assert drafted.accepted > 5
    assert [drafted.result(one.id) for one in requests] == [plain.result(r.id) for r in requests]


@pytest.mark.slow
def test_a_preempted_answer_equals_an_undisturbed_one(grammars: Grammars) -> None:
    requests = [
        request(f"r{index}", json_schema_grammar(OBJECT), seed=index, max_tokens=60)
        for index in range(6)
    ]
    expected = alone(partial(Engine, grammars), requests)
    for drafting in (False, True):
        tight = Engine(grammars, runner=NoiseRunner(num_blocks=36), drafting=drafting)
        tight.run(*requests)
        assert tight.preempted > 0
        for one in requests:
            assert tight.result(one.id) == expected.result(one.id)


@pytest.mark.slow
def test_a_take_over_goes_on_exactly_after_every_token(grammars: Grammars) -> None:
    """Up to the last: an engine may die between an answer's last token and its end."""
    requests = [*some_requests(3)[:6], request("cut", json_schema_grammar(OBJECT), max_tokens=9)]
    expected = alone(partial(Engine, grammars), requests)
    works = [
        Work(request=replace(one, id=f"{one.id}/{num}"), tokens=tuple(expected.ids[one.id][:num]))
        for one in requests
        for num in range(len(expected.ids[one.id]) + 1)
    ]
    engine = Engine(grammars, drafting=True).run(*works)
    assert len(works) > 100
    for work in works:
        name = work.request.id.split("/")[0]
        known = len(work.tokens)
        assert engine.ids[work.request.id] == expected.ids[name][known:]
        assert engine.ends[work.request.id].reason == expected.ends[name].reason
        assert engine.ends[work.request.id].count == len(expected.ids[name])


def test_an_answer_that_can_only_end_ends_by_itself(grammars: Grammars) -> None:
    """No token is spent on the end; where more could come, the end token decides."""
    engine = Engine(grammars).run(
        request("whole", choice_grammar(["free"])),
        request("open", regex_grammar("a+"), max_tokens=400),
    )
    assert engine.result("whole")[1:] == ("free", FinishReason.STOP, None)
    ids, text, reason, stopped_by = engine.result("open")
    assert (reason, stopped_by) == (FinishReason.STOP, min(EOS_IDS))
    assert ids[-1] in EOS_IDS
    assert set(text) == {"a"}


def test_the_limit_and_a_stop_string_cut_it(grammars: Grammars) -> None:
    whole = Engine(grammars).run(request("r", json_schema_grammar({"const": "fixed value"})))
    text = whole.texts["r"]
    assert json.loads(text) == "fixed value"
    stopping = replace(request("r", json_schema_grammar({"const": "fixed value"})), stop=("d v",))
    assert Engine(grammars).run(stopping).result("r")[1:] == ('"fixe', FinishReason.STOP, "d v")
    count = len(whole.ids["r"])
    for limit, reason in ((count - 1, FinishReason.LENGTH), (count, FinishReason.STOP)):
        cut = Engine(grammars).run(replace(request("r", stopping.grammar), max_tokens=limit))
        assert cut.ends["r"].reason is reason
        assert cut.ids["r"] == whole.ids["r"][:limit]


def test_a_grammar_that_fails_ends_its_own_request_alone(grammars: Grammars) -> None:
    """One that does not compile, one that comes to a dead end, tokens that do not match."""
    dead_end = 'start: "a" "b" x | "c"\nx: x "d"'
    fine = request("fine", json_schema_grammar(OBJECT))
    works = [
        Work(request=request("broken", "json:[")),
        Work(request=request("dead", lark_grammar(dead_end), logit_bias=((97, 100.0),))),
        Work(request=request("other", choice_grammar(["abc"])), tokens=(98,)),
        Work(request=fine),
    ]
    engine = Engine(grammars).run(*works)
    for name, count in (("broken", 0), ("dead", 2), ("other", 1)):
        end = engine.ends[name]
        assert (end.reason, end.error, end.count) == (FinishReason.ERROR, "grammar_failed", count)
    assert engine.result("fine") == Engine(grammars).run(fine).result("fine")


def test_an_engine_without_grammars_refuses_them() -> None:
    engine = Engine(None).run(request("r", json_object_grammar()))  # type: ignore[arg-type]
    assert engine.ends["r"].error == "grammar_failed"


def check_json(text: str, schema: dict[str, object]) -> None:
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    validator.validate(json.loads(text))


@pytest.mark.slow
def test_finished_answers_match_random_schemas(grammars: Grammars) -> None:
    check_schemas(grammars, range(1000, 1005), NoiseRunner())


@pytest.mark.slow
def test_finished_answers_match_two_hundred_random_schemas(grammars: Grammars) -> None:
    """From the tiny network, with drafts and without, in one batch of many."""
    config = tiny_model_config(vocab_size=VOCAB_SIZE, max_model_len=2048)
    runner = TorchRunner(
        config,
        tiny_weights(config, seed=1),
        options=RunnerOptions(dtype="float32", block_size=16, num_blocks=4096),
        digest="tiny",
    )
    check_schemas(grammars, range(200), runner)


def check_schemas(grammars: Grammars, seeds: range, runner: Runner) -> None:
    schemas = {f"s{seed}": random_schema(seed) for seed in seeds}
    requests = [
        request(name, json_schema_grammar(schema), seed=index, max_tokens=1000)
        for index, (name, schema) in enumerate(schemas.items())
    ]
    engine = Engine(grammars, runner=runner).run(*requests)
    finished = 0
    for name, schema in schemas.items():
        end = engine.ends[name]
        assert end.error is None, (name, schema)
        if end.reason is FinishReason.STOP:
            finished += 1
            check_json(engine.texts[name], schema)
    assert finished >= 0.97 * len(schemas)
    assert len(set(engine.texts.values())) >= 0.8 * len(schemas)
