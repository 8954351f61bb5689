"""The laws of open rows: without masks an answer is the one with masks, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.batch import SamplingBatch, Words
from model.grammar import (
    Grammars,
    Matcher,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from model.sampler import sample
from service.engine.guide import Guide, MaskTime
from service.engine.inbox import Work
from service.engine.plan import EngineConfig
from service.messages import FinishReason, GenerationRequest
from tests.laws.noise import EOS_IDS, TOKEN_BYTES, VOCAB_SIZE, NoiseRunner
from tests.laws.random_schemas import random_schema
from tests.laws.test_structured import (
    OBJECT,
    DeferringNoise,
    Engine,
    OverlappedNoise,
    alone,
    request,
)

DEAD_END = lark_grammar('start: "a" "b" x | "c"\nx: x "d"')


class CountingMatcher(Matcher):
    """Counts masks."""

    def __init__(self, matcher: Matcher, counts: list[int]) -> None:
        super().__init__(matcher._state)
        self.counts = counts

    def copy(self) -> Matcher:
        return CountingMatcher(self, self.counts)

    def fill(self, mask_W: Words) -> None:
        self.counts[0] += 1
        super().fill(mask_W)


class CountingGrammars(Grammars):
    """Counts masks."""

    def __init__(self) -> None:
        super().__init__(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=VOCAB_SIZE, kept=512)
        self.counts = [0]

    def matcher(self, notation: str) -> Matcher:
        return CountingMatcher(super().matcher(notation), self.counts)


@pytest.fixture(scope="module")
def grammars() -> CountingGrammars:
    return CountingGrammars()


def greedy(name: str, grammar: str | None, **fields: object) -> GenerationRequest:
    plain = {"temperature": 0.0, "logit_bias": (), "max_tokens": 50}
    return request(name, grammar, **(plain | fields))


def some_requests(seed: int) -> list[GenerationRequest]:
    """Most may have open rows; others are sampled, scored, adjusted, or have no grammar."""
    notations = [
        json_schema_grammar(OBJECT), json_schema_grammar(random_schema(seed)),
        json_schema_grammar(random_schema(seed + 100)), json_object_grammar(), DEAD_END,
        regex_grammar("(the )?[a-f]{3,9}[0-9]{2}"), regex_grammar("([a-z]{1,5}[ ,.])+"),
        choice_grammar(["fixed", "fix", "free", "nothing"]),
        lark_grammar('start: "(" start ")" | "x" | "12"'),
    ]  # fmt: skip
    draw = random.Random(seed)
    others = [
        greedy("sampled", notations[0], temperature=1.0),
        greedy("scored", notations[0], top_logprobs=2),
        greedy("penalised", notations[1], frequency_penalty=0.4),
        greedy("biased", notations[0], logit_bias=((97, 3.0),)),
        replace(greedy("early", regex_grammar("a+")), min_tokens=9),
        replace(greedy("plain", None, max_tokens=90), ignore_eos=True),
    ]
    requests = [greedy(f"r{index}", each) for index, each in enumerate(notations)] + others
    draw.shuffle(requests)
    return requests


def engine_of(
    grammars: Grammars, *, keeps: bool, config: EngineConfig | None = None, num_blocks: int = 1024
) -> Engine:
    engine = Engine(grammars, runner=NoiseRunner(keeps_logits=keeps, num_blocks=num_blocks))
    return engine if config is None else replace(engine, config=config)


def check(engine: Engine, requests: Sequence[GenerationRequest], expected: Engine) -> None:
    engine.run(*requests)
    for one in requests:
        assert engine.result(one.id) == expected.result(one.id)
        assert engine.ends[one.id].error == expected.ends[one.id].error


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_without_masks_answers_are_the_same(grammars: CountingGrammars, seed: int) -> None:
    """Alone with masks; then open: together, in small chunks, with drafts, preempted, ahead."""
    requests = some_requests(seed)
    expected = alone(lambda: engine_of(grammars, keeps=False), requests)
    reasons = [end.reason for end in expected.ends.values()]
    assert FinishReason.ERROR in reasons or expected.texts["r4"] == "c"
    masks, grammars.counts[0] = grammars.counts[0], 0
    check(engine_of(grammars, keeps=True), requests, expected)
    assert 0 < grammars.counts[0] < masks
    narrow = EngineConfig(max_batch_tokens=16, max_sequences=3, max_prompt_chunk=5)
    check(engine_of(grammars, keeps=True, config=narrow), requests, expected)
    drafting = replace(engine_of(grammars, keeps=True), drafting=True)
    check(drafting, requests, expected)
    assert drafting.accepted > 5
    tight = replace(engine_of(grammars, keeps=True, num_blocks=40), drafting=seed == 1)
    check(tight, requests, expected)
    assert tight.preempted > 0
    ahead = OverlappedNoise(keeps_logits=True)
    check(Engine(grammars, runner=ahead), requests, expected)
    assert ahead.most_ahead == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_step_launched_with_the_wrong_token_changes_no_answer(
    grammars: CountingGrammars, seed: int
) -> None:
    """The host chose another token than the runner's, which the next step computes already. That
    one is computed again, also if it filled a block, or if its sequence loses its seat meanwhile.
    """
    requests = some_requests(seed)
    expected = alone(lambda: engine_of(grammars, keeps=False), requests)
    later = [  # finds blocks of earlier answers
        replace(one, id=f"{one.id}+", prompt_ids=(*one.prompt_ids, *expected.ids[one.id]))
        for one in requests
    ]
    requests += later
    expected = alone(lambda: engine_of(grammars, keeps=False), requests)
    for num_blocks in (1024, 70, 52):
        runner = DeferringNoise(keeps_logits=True, num_blocks=num_blocks)
        engine = Engine(grammars, runner=runner)
        check(engine, requests, expected)
        assert runner.num_deferred > 20
        assert engine.skipped > 5
        if num_blocks == 1024:
            assert engine.skipped < 60, "the tokens after such a one get masks"
        assert (engine.preempted > 0) is (num_blocks < 1024)


def test_an_abort_leaves_no_block_with_a_wrong_token(grammars: CountingGrammars) -> None:
    """Between the step that computes it and the one that computes the right one."""
    for num in range(24):
        one = greedy("x" * (num % 8), json_schema_grammar(OBJECT), max_tokens=12)
        answer = alone(lambda: engine_of(grammars, keeps=False), [one])
        later = replace(one, id="later", prompt_ids=(*one.prompt_ids, *answer.ids[one.id]))
        expected = alone(lambda: engine_of(grammars, keeps=False), [later])
        engine = Engine(grammars, runner=DeferringNoise(keeps_logits=True))
        loop = engine.loop()
        engine.add(loop, one)
        for _ in range(2 + num // 8):
            loop.step()
        loop.abort(one.id)
        loop.step()
        engine.add(loop, later)
        engine.finish(loop)
        assert one.id not in engine.ends
        assert engine.result("later") == expected.result("later")


def test_a_take_over_goes_on_exactly_after_every_token(grammars: CountingGrammars) -> None:
    requests = [each for each in some_requests(5) if each.id.startswith("r")]
    expected = alone(lambda: engine_of(grammars, keeps=False), requests)
    works = [
        Work(request=replace(one, id=f"{one.id}/{num}"), tokens=tuple(expected.ids[one.id][:num]))
        for one in requests
        for num in range(0, len(expected.ids[one.id]) + 1, 3)
    ]
    engine = engine_of(grammars, keeps=True).run(*works)
    for work in works:
        name, known = work.request.id.split("/")[0], len(work.tokens)
        assert engine.ids[work.request.id] == expected.ids[name][known:]
        assert engine.ends[work.request.id].reason == expected.ends[name].reason


def test_a_dead_end_fails_after_the_same_token(grammars: CountingGrammars) -> None:
    """Its mask is computed because every token that is tried is forbidden; it allows none."""
    engines = [engine_of(grammars, keeps=keeps) for keeps in (False, True)]
    for engine in engines:
        engine.run(Work(request=greedy("dead", DEAD_END), tokens=(97,)), greedy("other", None))
        end = engine.ends["dead"]
        assert (end.reason, end.error, end.count) == (FinishReason.ERROR, "grammar_failed", 2)
    assert engines[0].result("other") == engines[1].result("other")


def open_guide(matcher: Matcher, mask_time: MaskTime | None = None) -> Guide:
    guide = Guide(
        matcher,
        token_bytes=TOKEN_BYTES,
        vocab_size=VOCAB_SIZE,
        mask_time=mask_time or MaskTime(lambda: 0.0),
        takes_argmax=True,
        probes=list(b"ae1"),
    )
    guide._time.compute_masks([guide])
    return guide


def odd_logits(draw: np.random.Generator) -> Iterator[torch.Tensor]:
    """Flat and steep, with equals, with numbers that are none, and without any number at all."""
    for _ in range(12):
        logits_V = draw.normal(0, 3, VOCAB_SIZE).astype(np.float32)
        yield torch.from_numpy(logits_V)
        yield torch.from_numpy(np.round(logits_V) + np.float32(0.0))
        yield torch.from_numpy(np.where(draw.random(VOCAB_SIZE) < 0.9, -np.inf, logits_V))
    yield torch.full((VOCAB_SIZE,), -torch.inf)


@pytest.mark.parametrize("text", [b"", b'{"', b'{"name": "'])
def test_the_choice_of_an_open_row_is_the_masked_argmax(
    grammars: CountingGrammars, text: bytes
) -> None:
    guide = open_guide(grammars.matcher(json_schema_grammar(OBJECT)))
    for token in text:
        guide.read(token)
    mask_W = np.zeros(-(-VOCAB_SIZE // 32), np.uint32)
    guide._matcher.fill(mask_W)
    masked = replace(
        SamplingBatch.plain(1, vocab_size=VOCAB_SIZE),
        mask_rows_M=np.zeros(1, np.int32),
        masks_MW=mask_W[None],
    )
    tried = set()
    for logits_V in odd_logits(np.random.default_rng(len(text))):
        expected = int(sample(logits_V[None], masked).tokens_R[0])
        grammars.counts[0] = 0
        found = guide.choose(int(logits_V.argmax()), logits_V.numpy().copy())
        assert found == expected
        tried.add(grammars.counts[0])
        guide._has_mask = False
    assert tried == ({0, 1} if text else {1}), "few of many tokens may be the first"


def test_numbers_that_are_none_are_never_chosen(grammars: CountingGrammars) -> None:
    guide = open_guide(grammars.matcher(regex_grammar("[a-c]+")))
    logits_V = np.zeros(VOCAB_SIZE, np.float32)
    logits_V[[5, *b"ab"]] = 9.0, np.nan, np.nan
    assert guide.choose(5, logits_V) == ord("c")


def test_masks_that_were_slow_once_are_computed_ahead(grammars: CountingGrammars) -> None:
    """So they wait for their turn; and if one fails, the row is open all the same."""
    now = [0.0]
    guide = open_guide(grammars.matcher(DEAD_END), MaskTime(lambda: now[0]))
    assert (guide.ready, guide.is_open) == (True, True)

    class Slow(CountingMatcher):
        def fill(self, mask_W: Words) -> None:
            now[0] += 0.004
            super().fill(mask_W)

        def copy(self) -> Matcher:
            return Slow(self, self.counts)

    guide._matcher = Slow(guide._matcher, grammars.counts)  # type: ignore[arg-type]
    logits_V = np.zeros(VOCAB_SIZE, np.float32)
    logits_V[: ord("a")] = 1.0
    assert guide.choose(0, logits_V) == ord("a")
    guide.read(ord("a"))
    assert not guide.ready
    guide._time.compute_masks([guide])
    assert (guide.ready, guide.is_open) == (True, False)
    guide.read(ord("b"))
    guide._time.compute_masks([guide])
    assert (guide.ready, guide.is_open, guide.failed) == (True, True, False)
    assert guide.choose(0, logits_V) is None
    assert (guide.ready, guide.failed) == (False, True)
