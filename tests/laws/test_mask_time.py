"""Laws of the time that masks take: no grammar delays other sequences, and costly ones fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from model.batch import Words
from model.grammar import Grammars, Matcher, json_schema_grammar, lark_grammar, regex_grammar
from model.runners import Runner
from service.engine.guide import ANSWER_LIMIT, MASK_LIMIT, TOKEN_LIMIT, MaskTime
from service.engine.inbox import Work
from service.engine.loop import EngineLoop
from service.engine.observer import Observer, StepReport
from service.engine.plan import EngineConfig
from service.messages import End, Event, FinishReason, GenerationRequest, SamplingParams
from tests.laws.noise import EOS_IDS, TOKEN_BYTES, VOCAB_SIZE, NoiseRunner
from tests.laws.test_structured import DeferringNoise, FreeRows

ALWAYS_A = ((ord("a"), 100.0),)
MANY = 500  # rules that wait for a rule, and rules that complete it: each pair is work
# Each passes the grammar validator. With rows of 4,000 items a mask of the first takes 0.4 s after
# 400 tokens, and one of the last (of 1,200 rules) 0.01 ms at one token and 1.5 s at the next.
HOSTILE = {
    "ambiguous": 'start: s\ns: s s | s s s | "a"',
    "more ambiguous": 'start: s\ns: s s | s s s | s s s s | s s s s s | "a" | ',
    "sudden": "\n".join(
        [
            "start: pre q",
            "pre: /a{40}/",
            "q: " + " | ".join(f"w{i}" for i in range(MANY)),
            *(f'w{i}: t "{i}"' for i in range(MANY)),
            "t: " + " | ".join(f"c{i}" for i in range(MANY)),
            *(f"c{i}: X" for i in range(MANY)),
            'X: "a"',
        ]
    ),
}


class CostlyMatcher(Matcher):
    """Advances a clock by the given cost of each mask."""

    def __init__(self, matcher: Matcher, spend: Callable[[], None]) -> None:
        super().__init__(matcher._state)
        self.spend = spend

    def copy(self) -> Matcher:
        return CostlyMatcher(self, self.spend)

    def fill(self, mask_W: Words) -> None:
        self.spend()
        super().fill(mask_W)


class CostlyGrammars(Grammars):
    """A mask takes 0.1 ms of CPU time, or what `costs` has for its grammar."""

    def __init__(self) -> None:
        super().__init__(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=VOCAB_SIZE)
        self.costs: dict[str, float] = {}
        self.now = 0.0
        self.num_masks = 0

    def matcher(self, notation: str) -> Matcher:
        def spend() -> None:
            self.now += self.costs.get(notation, 0.0001)
            self.num_masks += 1

        return CostlyMatcher(super().matcher(notation), spend)


class Skipped(Observer):
    """Counts rows in vain."""

    rows = recomputed = preemptions = 0

    def stepped(self, report: StepReport) -> None:
        self.rows += report.num_skipped
        self.recomputed += report.recomputed_tokens
        self.preemptions += len(report.preempted)


class Engine:
    """A real engine, stepped by hand; `grown` are the requests that got tokens in the last step."""

    def __init__(
        self, grammars: Grammars, *, speculate: bool = False, runner: Runner | None = None
    ) -> None:
        self.now = 0.0
        self.texts: dict[str, str] = {}
        self.ends: dict[str, End] = {}
        self.grown: set[str] = set()
        self.skipped = Skipped()
        self.loop = EngineLoop(
            runner or NoiseRunner(),
            config=EngineConfig(max_batch_tokens=512, max_sequences=64, speculate=speculate),
            cost=FreeRows(),
            token_bytes=TOKEN_BYTES,
            eos_ids=EOS_IDS,
            deliver=self._take,
            observer=self.skipped,
            clock=lambda: self.now,
            grammars=grammars,
        )
        if isinstance(grammars, CostlyGrammars):
            self.loop._outputs.guides.mask_time = MaskTime(lambda: grammars.now)

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event.record, End):
                self.ends[event.request_id] = event.record
            else:
                self.grown.add(event.request_id)
                self.texts[event.request_id] += event.record.text

    def add(self, *requests: GenerationRequest, **fields: object) -> None:
        for request in requests:
            self.texts[request.id] = ""
            self.loop.add(Work(request=request, **fields))  # type: ignore[arg-type]  # by name

    def step(self) -> bool:
        self.grown = set()
        going_on = self.loop.step()
        self.loop.check_integrity()
        return going_on

    def run(self) -> None:
        while self.step():
            pass
        assert not self.loop.busy


def request(
    name: str, grammar: str | None, *, max_tokens: int = 600, temperature: float = 1.0
) -> GenerationRequest:
    bias = ALWAYS_A if name.startswith("hostile") else ()
    return GenerationRequest(
        id=name,
        prompt_ids=(*b"tell: ", *name.encode()),
        max_tokens=max_tokens,
        sampling=SamplingParams(seed=5, logit_bias=bias, temperature=temperature),
        grammar=grammar,
        tenant=name.split(maxsplit=1)[0],
        ignore_eos=grammar is None,
    )


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=VOCAB_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_grammar_whose_masks_grow_fails_at_the_same_token(grammars: Grammars, name: str) -> None:
    """By the sizes of its masks, not by their time: alone, with drafts and after a failover."""
    hostile = request("hostile", lark_grammar(HOSTILE[name]))
    alone, drafted, resumed = Engine(grammars), Engine(grammars, speculate=True), Engine(grammars)
    alone.add(hostile)
    drafted.add(hostile, request("other", None, max_tokens=9))
    alone.run()
    drafted.run()
    end = alone.ends["hostile"]
    assert (end.reason, end.error) == (FinishReason.ERROR, "grammar_failed")
    assert 0 < end.count < 150
    assert drafted.ends["hostile"].count == end.count
    for known in range(0, end.count + 1, 30):
        resumed.add(replace(hostile, id=f"hostile {known}"), tokens=(ord("a"),) * known)
    resumed.run()
    assert {one.count for one in resumed.ends.values()} == {end.count}


GOOD = json_schema_grammar({"type": "array", "items": {"type": "string", "maxLength": 30},
                            "minItems": 20})  # fmt: skip
SLOW = regex_grammar("a*")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [NoiseRunner, DeferringNoise])
def test_no_sequence_waits_for_the_masks_of_others(kind: type[NoiseRunner]) -> None:
    """Ten answers whose masks take 30 ms each, beside two others: the others get a token in every
    step, and a step's masks take the time of a step and of one mask at most. If some are made
    before a step and some beside it, each of them.
    """
    grammars = CostlyGrammars()
    grammars.costs[SLOW] = 0.03
    engine, quiet = Engine(grammars, runner=kind()), Engine(CostlyGrammars())
    most = 0.1 if kind is DeferringNoise else 0.05
    others = [request("good", GOOD, max_tokens=80), request("plain", None, max_tokens=80)]
    slow = [request(f"hostile {n}", SLOW, max_tokens=4) for n in range(10)]
    engine.add(*slow, *others)
    quiet.add(*others)
    engine.step()  # learns the cost of each tenant's masks
    engine.step()
    quiet.run()
    steps = 2
    while not {"good", "plain"} <= engine.ends.keys():
        before = grammars.now
        engine.step()
        steps += 1
        assert grammars.now - before <= most
        assert {"good", "plain"} - engine.ends.keys() <= engine.grown
    assert steps <= 83
    assert {name: engine.texts[name] for name in quiet.texts} == quiet.texts
    engine.run()
    assert {engine.ends[one.id].reason for one in slow} == {FinishReason.LENGTH}
    assert {engine.texts[one.id] for one in slow} == {"aaaa"}


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [False, True])
def test_a_mask_that_comes_too_late_for_a_step_changes_no_answer(greedy: bool) -> None:
    """The step has computed the layers then; the sequence's last token is computed again."""
    slow = [
        request(
            f"r{n}",
            json_schema_grammar({"type": "array", "minItems": 3 + n}),
            max_tokens=40,
            temperature=0.0 if greedy else 1.0,
        )
        for n in range(6)
    ]
    grammars, quiet = CostlyGrammars(), Engine(CostlyGrammars())
    for n, each in enumerate(slow):
        grammars.costs[str(each.grammar)] = 0.006 + 0.001 * n  # of 20 ms a step
    runner = DeferringNoise(keeps_logits=greedy)
    engine = Engine(grammars, runner=runner)
    for one in (quiet, engine):
        one.add(*slow, request("plain", None, max_tokens=80))
        one.run()
    assert engine.texts == quiet.texts
    assert {name: end.count for name, end in engine.ends.items()} == {
        name: end.count for name, end in quiet.ends.items()
    }
    assert runner.num_deferred > 40
    assert engine.skipped.rows > 20
    assert not engine.skipped.recomputed
    assert not engine.skipped.preemptions


@pytest.mark.slow
def test_the_answer_ends_in_the_step_after_a_mask_that_took_too_long() -> None:
    grammars = CostlyGrammars()
    engine = Engine(grammars)
    engine.add(request("hostile", SLOW), request("good", GOOD))
    for _ in range(5):
        engine.step()
    grammars.costs[SLOW] = MASK_LIMIT * 1.01
    engine.step()
    end = engine.ends["hostile"]
    assert (end.reason, end.error, end.count) == (FinishReason.ERROR, "grammar_failed", 5)
    engine.step()
    assert "good" in engine.grown
    engine.run()
    assert engine.ends["good"].error is None


@pytest.mark.parametrize("speculate", [False, True])
def test_all_masks_of_an_answer_have_a_limit(speculate: bool) -> None:
    """Also those behind drafts, and those of a request that an engine takes over."""
    grammars = CostlyGrammars()
    grammars.costs[SLOW] = cost = 0.1
    engine = Engine(grammars, speculate=speculate)
    engine.add(request("hostile", SLOW))
    engine.run()
    end = engine.ends["hostile"]
    assert (end.error, engine.texts["hostile"]) == ("grammar_failed", "a" * end.count)
    most = ANSWER_LIMIT / (cost - TOKEN_LIMIT) + 1
    assert most - 2 <= grammars.num_masks <= most


def test_drafts_stop_when_the_time_of_the_step_is_used_up() -> None:
    """A quick mask is no promise that the masks behind drafts are quick."""
    grammars = CostlyGrammars()
    forced = regex_grammar("a{30}")
    engine = Engine(grammars, speculate=True)
    engine.add(*(request(f"hostile {n}", forced) for n in range(8)))
    engine.step()
    engine.step()
    grammars.costs[forced] = 0.015
    for _ in range(3):
        before = grammars.now
        engine.step()
        assert grammars.now - before <= 0.05
    del grammars.costs[forced]
    engine.run()
    assert set(engine.texts.values()) == {"a" * 30}


def test_neither_cancel_nor_deadline_waits_for_a_mask() -> None:
    grammars = CostlyGrammars()
    grammars.costs[SLOW] = 0.03
    engine = Engine(grammars)
    engine.add(*(request(f"hostile {n}", SLOW) for n in range(12)))
    engine.add(request("hostile late", SLOW), remaining_ms=1000)
    for _ in range(3):
        engine.step()
    waiting = engine.loop._outputs.without_mask().keys()
    assert "hostile 11" in waiting
    assert "hostile late" in waiting
    engine.loop.abort("hostile 11")
    engine.now += 2.0
    masks = grammars.num_masks
    engine.step()
    assert engine.ends["hostile late"].reason is FinishReason.DEADLINE
    assert "hostile 11" not in engine.loop._outputs.builders
    assert grammars.num_masks - masks == 1


def test_a_failover_reads_a_long_answer_in_several_steps() -> None:
    """Reading the known tokens again takes CPU time, too; other sequences do not wait for it."""
    grammars = CostlyGrammars()

    class SlowReads(CostlyMatcher):
        def read(self, token: int) -> None:
            grammars.now += 0.004
            super().read(token)

    class SlowReadGrammars(CostlyGrammars):
        def matcher(self, notation: str) -> Matcher:
            return SlowReads(super().matcher(notation), lambda: None)

    engine = Engine(SlowReadGrammars())
    engine.loop._outputs.guides.mask_time = MaskTime(lambda: grammars.now)
    engine.add(request("plain", None, max_tokens=60))
    engine.step()
    engine.add(request("hostile", SLOW, max_tokens=102), tokens=(ord("a"),) * 100)
    while "hostile" not in engine.ends:
        before = grammars.now
        engine.step()
        assert "plain" in engine.grown
        assert grammars.now - before <= 0.03
    assert engine.ends["hostile"] == End(count=102, reason=FinishReason.LENGTH)


def test_time_is_that_of_the_thread() -> None:
    """A process that gets no CPU fails no request."""
    assert MaskTime().clock is time.thread_time
