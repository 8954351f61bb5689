"""The laws of an answer that thinks: budget and grammar hold, however it is run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from model.batch import unpack_masks
from model.grammar import (
    Grammars,
    choice_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from service.engine.inbox import Work
from service.engine.plan import EngineConfig
from service.engine.thinking import FreeMasks, ThinkingMatcher
from service.messages import FinishReason, GenerationRequest, SamplingParams, Thinking
from service.thinking import THINKING_FORMATS, Phase, Splitter, TokenScan, symbol
from tests.laws import noise
from tests.laws.noise import ENDINGS, EOS_IDS, NoiseRunner
from tests.laws.test_structured import OBJECT, Engine, alone
from tests.support.builders import at_length
from tests.support.fakes import Overlapping

# Tags as added tokens, which have a text, and as special tokens, which have none; a token that ends
# a spelled tag and begins more.
TAGS = (b"<think>", b"</think>", b"", b"", b">{", b">1")
TOKEN_BYTES = (*noise.TOKEN_BYTES, *TAGS)
SIZE = len(TOKEN_BYTES)
OPEN, CLOSE, SPECIAL_OPEN, SPECIAL_CLOSE = range(len(noise.TOKEN_BYTES), SIZE - 2)
FORMATS = {
    "added": Thinking(format="think", opened=False, openings=((OPEN,),), closing=(CLOSE,)),
    "spelled": Thinking(
        format="think", opened=False, openings=(tuple(b"<think>"),), closing=tuple(b"</think>")
    ),
    "special": Thinking(
        format="mistral",
        opened=False,
        openings=((SPECIAL_OPEN,),),
        closing=(SPECIAL_CLOSE,),
        symbols=(("[/THINK]", SPECIAL_CLOSE), ("[THINK]", SPECIAL_OPEN)),
    ),
}
GRAMMARS = {
    "json": json_schema_grammar(OBJECT),
    "regex": regex_grammar("(the )?[a-f]{3,9}[0-9]{2}"),
    "choice": choice_grammar(["fixed", "<think>", "free", "<"]),
    "brace": regex_grammar(r"\{[0-9]{1,9}"),
    "any": lark_grammar("start: TEXT\nTEXT: /(.|\\n)*/"),
}


class Noise(NoiseRunner):
    """Noise over these tokens."""

    def __init__(self, *, num_blocks: int = 1024) -> None:
        super().__init__(num_blocks=num_blocks, token_bytes=TOKEN_BYTES)


class OverlappedNoise(Overlapping, Noise):
    """The same, one step ahead."""


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKEN_BYTES, eos_ids=EOS_IDS, vocab_size=SIZE, kept=512)


def engine_of(grammars: Grammars, **fields: object) -> Engine:
    fields = {"runner": Noise(), **fields}
    return Engine(grammars, token_bytes=TOKEN_BYTES, **fields)  # type: ignore[arg-type]


def some_requests(seed: int, *, num: int = 12) -> list[GenerationRequest]:
    """Every format, opened or not, with budgets, grammars, penalties and none of them."""
    draw = random.Random(seed)
    return [some_request(draw, f"r{index}") for index in range(num)]


def some_request(draw: random.Random, name: str) -> GenerationRequest:
    kind = draw.choice(list(FORMATS))
    thinking = replace(
        FORMATS[kind],
        opened=draw.random() < 0.6,
        verbatim=draw.random() < 0.5,
        budget=draw.choice([None, 0, 1, 2, 3, 8, 20]),
    )
    grammar = draw.choice([None, *GRAMMARS.values()])
    bias = {token: 2.5 for token, text in enumerate(TOKEN_BYTES) if text in ENDINGS}
    tags = {"added": (OPEN, CLOSE), "special": (SPECIAL_OPEN, SPECIAL_CLOSE)}.get(kind, (60, 60))
    bias |= {tags[0]: draw.choice([0.0, 8.0]), tags[1]: draw.choice([-5.0, 1.0, 4.0])}
    bias |= dict.fromkeys(EOS_IDS, draw.choice([-5.0, 0.0]))
    return GenerationRequest(
        id=name,
        prompt_ids=(*b"think: ", *name.encode()),
        max_tokens=draw.choice([5, 30, 50]),
        sampling=SamplingParams(
            seed=draw.randrange(2**64),
            temperature=draw.choice([0.0, 0.7, 1.0, 1.5]),
            top_k=draw.choice([None, 20]),
            frequency_penalty=draw.choice([0.0, 0.0, 0.4]),
            logit_bias=tuple(sorted(bias.items())),
        ),
        grammar=grammar,
        thinking=thinking,
    )


def phases(thinking: Thinking, ids: Sequence[int]) -> list[tuple[Phase, int]]:
    """(phase, tokens of thinking) before each token and after the last."""
    symbols = {text: symbol(index) for index, (text, _) in enumerate(thinking.symbols)}
    scan = TokenScan(
        Splitter(
            THINKING_FORMATS[thinking.format].spelled(symbols),
            opened=thinking.opened,
            verbatim=thinking.verbatim,
        ),
        token_bytes=TOKEN_BYTES,
        symbols={id_: symbols[text] for text, id_ in thinking.symbols},
    )
    found = [(scan.phase, scan.num_thinking)]
    for token in ids:
        scan.read(token)
        found.append((scan.phase, scan.num_thinking))
    return found


def check(one: GenerationRequest, engine: Engine, grammars: Grammars) -> str:
    """The budget and the grammar hold. Returns how the thinking ended."""
    assert one.thinking is not None
    ids, end = engine.ids[one.id], engine.ends[one.id]
    assert end.reason in {FinishReason.STOP, FinishReason.LENGTH}, (one, ids, end)
    found = phases(one.thinking, ids)
    budget, closing = one.thinking.budget, list(one.thinking.closing)
    thought = [at for at, (phase, _) in enumerate(found) if phase is Phase.THINKING]
    kind = "none" if not thought else "free" if found[-1][0] is Phase.CONTENT else "cut"
    if budget is not None and thought:
        spent = [at for at in thought if found[at][1] >= budget]
        if spent:
            assert ids[spent[0] : spent[0] + len(closing)] == closing[: len(ids) - spent[0]]
            kind = "forced"
        assert len(thought) <= budget + len(closing)
    if one.grammar is not None:
        begin = thought[-1] + 1 if thought else 0
        if kind == "cut":
            assert end.reason is FinishReason.LENGTH
        else:
            matcher = grammars.matcher(one.grammar)
            for token in ids[begin:]:
                if found[-1][0] is not Phase.START:  # the limit may cut a tag
                    matcher.read(token)
            assert matcher.fulfilled or end.reason is FinishReason.LENGTH
    return kind


@pytest.mark.slow
def test_budgets_and_grammars_hold(grammars: Grammars) -> None:
    """Over requests of all kinds; all ways to end come up."""
    requests = [one for seed in range(7) for one in some_requests(seed)]
    requests = [replace(one, id=f"r{index}") for index, one in enumerate(requests)]
    engine = engine_of(grammars).run(*requests)
    kinds = [check(one, engine, grammars) for one in requests]
    assert all(kinds.count(kind) > 3 for kind in ("none", "free", "cut", "forced"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *at_length(1, 2)])
def test_neither_company_nor_drafts_nor_chunks_change_an_answer(
    grammars: Grammars, seed: int
) -> None:
    requests = some_requests(100 + seed, num=9)
    expected = alone(partial(engine_of, grammars), requests)
    narrow = EngineConfig(max_batch_tokens=16, max_sequences=3, max_prompt_chunk=5)
    engines = [
        engine_of(grammars),
        engine_of(grammars, drafting=True),
        engine_of(grammars, config=narrow, drafting=True),
        engine_of(grammars, runner=OverlappedNoise()),
        engine_of(grammars, runner=Noise(num_blocks=20), drafting=True),
    ]
    for engine in engines:
        engine.run(*requests)
        for one in requests:
            assert engine.result(one.id) == expected.result(one.id)
    assert engines[1].accepted > 10
    assert engines[-1].preempted > 0


def test_a_budget_alone_does_not_slow_others(grammars: Grammars) -> None:
    """Steps stay one ahead until its tokens decide what comes next."""
    thinking = replace(FORMATS["added"], opened=True, budget=40)
    one = replace(some_request(random.Random(1), "r"), grammar=None, thinking=thinking)
    bias = ((CLOSE, -50.0), *((id_, -50.0) for id_ in EOS_IDS))
    sampling = replace(one.sampling, logit_bias=bias, frequency_penalty=0.0)
    one = replace(one, sampling=sampling, max_tokens=60)
    runner = OverlappedNoise()
    engine = engine_of(grammars, runner=runner).run(one)
    assert runner.most_ahead == 2
    assert engine.ids["r"].index(CLOSE) == 40
    assert len(engine.ids["r"]) == 60


@pytest.mark.slow
def test_a_failover_goes_on_exactly_after_every_token(grammars: Grammars) -> None:
    requests = some_requests(7, num=4)
    expected = alone(partial(engine_of, grammars), requests)
    works = [
        Work(request=replace(one, id=f"{one.id}/{num}"), tokens=tuple(expected.ids[one.id][:num]))
        for one in requests
        for num in range(len(expected.ids[one.id]) + 1)
    ]
    engine = engine_of(grammars, drafting=True).run(*works)
    for work in works:
        name, known = work.request.id.split("/")[0], len(work.tokens)
        assert engine.ids[work.request.id] == expected.ids[name][known:]
        assert engine.ends[work.request.id].reason == expected.ends[name].reason


@pytest.mark.slow
def test_a_budget_changes_nothing_before_it_is_spent(grammars: Grammars) -> None:
    requests = [replace(one, grammar=None) for one in some_requests(9)]
    for one in requests:
        assert one.thinking is not None
        free = replace(one, id="free", thinking=None, prompt_ids=one.prompt_ids)
        engine = engine_of(grammars).run(one, free)
        ids = engine.ids[one.id]
        budget = one.thinking.budget
        found = phases(one.thinking, ids)
        spent = [
            at
            for at, (phase, num) in enumerate(found)
            if budget is not None and phase is Phase.THINKING and num >= budget
        ]
        same = spent[0] if spent else len(ids)
        assert ids[:same] == engine.ids["free"][:same]


def test_content_of_a_schema_is_json(grammars: Grammars) -> None:
    thinking = replace(FORMATS["spelled"], opened=True, budget=6)
    one = some_request(random.Random(4), "r")
    one = replace(one, thinking=thinking, grammar=GRAMMARS["json"], max_tokens=400)
    engine = engine_of(grammars).run(one)
    thought, _, content = engine.texts["r"].partition("</think>")
    assert thought
    assert set(json.loads(content)) == {"name", "kind", "tags"}


@pytest.mark.parametrize("grammar", [GRAMMARS["brace"], None])
def test_no_token_ends_thinking_and_begins_content(grammars: Grammars, grammar: str | None) -> None:
    """The grammar reads whole tokens; without one, any token may come."""
    masks = FreeMasks(TOKEN_BYTES, vocab_size=SIZE, eos_ids=EOS_IDS)
    content = None if grammar is None else grammars.matcher(grammar)
    matcher = ThinkingMatcher(replace(FORMATS["spelled"], opened=True), content, masks)
    mask_W = np.zeros(-(-SIZE // 32), np.uint32)
    texts = {b">", b">{", b">1", b"", b"the "}
    allowed = []
    for token in (*b"x </think", None):
        matcher.fill(mask_W)
        allowed.append(
            {TOKEN_BYTES[id_] for id_ in unpack_masks(mask_W[None], SIZE)[0].nonzero()[0]}
        )
        if token is not None:
            matcher.read(token)
    assert all(texts <= tokens for tokens in allowed[:-1])  # special tokens have no text, either
    assert texts - allowed[-1] == (set() if grammar is None else {b">{", b">1"})


def test_an_unknown_format_is_refused(grammars: Grammars) -> None:
    """By an engine of an older version, as an error of this request alone."""
    thinking = replace(FORMATS["added"], format="of a later version")
    one = replace(some_request(random.Random(1), "r"), thinking=thinking)
    assert engine_of(grammars).run(one).ends["r"].error == "version_mismatch"
