"""The laws of an answer for encoder-decoders, over the real engine and a tiny network.

An answer depends on its source and the decoder's text alone: not on other sources in the step, not
on blocks that were found, not on preemption, not on an engine that answered a part before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from service.engine.inbox import Work
from service.engine.plan import EngineConfig
from service.messages import FinishReason, GenerationRequest, SamplingParams
from tests.laws.test_answers import TOLERANCE, Answers
from tests.support.builders import at_length, tiny_seq2seq_config

MODEL = tiny_seq2seq_config(max_model_len=96)
ROOMY = EngineConfig(max_batch_tokens=256, max_sequences=16, target_gap=1e6)


def make_requests(seed: int, *, count: int = 9) -> list[GenerationRequest]:
    """Greedy and sampled, of a few sources, with decoder prompts of one token and more."""
    draw = random.Random(seed)
    sources = [[draw.randrange(96) for _ in range(draw.randint(1, 30))] for _ in range(4)]
    made = []
    for index in range(count):
        source = draw.choice(sources)
        begun = [0, *(draw.randrange(96) for _ in range(draw.choice([0, 0, 3, 9])))]
        made.append(
            GenerationRequest(
                id=f"r{index}",
                prompt_ids=(*source, *begun),
                source=len(source),
                max_tokens=draw.randint(1, 24),
                sampling=SamplingParams(
                    seed=draw.randrange(2**64),
                    temperature=draw.choice([0.0, 0.8]),
                    repetition_penalty=draw.choice([1.0, 1.2]),
                    top_logprobs=2,
                ),
                ignore_eos=draw.random() < 0.5,
                priority=draw.randrange(3),
                tenant=draw.choice(["a", "b"]),
            )
        )
    return made


def alone(requests: Sequence[GenerationRequest]) -> Answers:
    """Each request by itself, nothing cached: the answer by definition."""
    together = Answers(config=ROOMY, model=MODEL)
    for request in requests:
        single = Answers(config=replace(ROOMY, prefix_cache=False), model=MODEL)
        single.run([[Work(request=request)]])
        together.records |= single.records
        together.ends |= single.ends
    return together


def check_equal(given: Answers, expected: Answers, requests: Sequence[GenerationRequest]) -> None:
    for request in requests:
        name = request.id
        assert given.ids(name) == expected.ids(name)
        assert given.ends[name].reason is expected.ends[name].reason
        pairs = zip(given.logprobs(name), expected.logprobs(name), strict=True)
        assert all(abs(one - other) < TOLERANCE for one, other in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *at_length(1, 2, 3)])
def test_a_batch_is_its_singles_whatever_is_cached_or_preempted(seed: int) -> None:
    """A small pool preempts; two waves of the same requests find sources in the cache."""
    requests = make_requests(seed)
    expected = alone(requests)
    tight = replace(ROOMY, max_batch_tokens=6, max_sequences=5, max_prompt_chunk=4)
    given = Answers(config=tight, blocks=24, model=MODEL)
    given.run([[Work(request=each)] for each in requests])
    check_equal(given, expected, requests)
    assert given.preemptions
    roomy = Answers(config=ROOMY, model=MODEL)
    again = [replace(each, id=f"again-{each.id}") for each in requests]
    roomy.run([[Work(request=each) for each in requests], [Work(request=each) for each in again]])
    check_equal(roomy, expected, requests)
    assert roomy.prefix_hits
    for request in requests:
        assert roomy.ids(f"again-{request.id}") == expected.ids(request.id)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, *at_length(5)])
def test_another_engine_continues_an_answer(seed: int) -> None:
    requests = make_requests(seed)
    whole = alone(requests)
    draw = random.Random(seed)
    known = {each.id: tuple(whole.ids(each.id)) for each in requests}
    cut = {name: ids[: draw.randrange(len(ids))] for name, ids in known.items()}
    resumed = Answers(config=ROOMY, model=MODEL)
    resumed.run([[Work(request=each, tokens=cut[each.id]) for each in requests]])
    for name, ids in known.items():
        assert (*cut[name], *resumed.ids(name)) == ids


@pytest.mark.slow
def test_the_source_decides_the_answer() -> None:
    """Of 12 sources that end alike no two have the same answer: none is found in another's place,
    though their last blocks and the decoder's texts are equal.
    """
    ending = [7] * 12
    requests = [
        GenerationRequest(
            id=f"r{first}",
            prompt_ids=(first, *ending, 0),
            source=1 + len(ending),
            max_tokens=20,
            sampling=SamplingParams(seed=0, temperature=0.0, top_logprobs=0),
            ignore_eos=True,
        )
        for first in range(20, 32)
    ]
    given = Answers(config=ROOMY, model=MODEL).run([[Work(request=each)] for each in requests])
    expected = alone(requests)
    check_equal(given, expected, requests)
    scores = {tuple(round(value, 3) for value in given.logprobs(each.id)) for each in requests}
    assert len(scores) == len(requests)


def test_what_can_never_be_answered_is_refused() -> None:
    """A source that does not fit, none for an encoder, one for a decoder: the engine goes on."""
    good = make_requests(0)[0]
    too_long = replace(good, id="long", prompt_ids=(*([5] * 90), 0), source=90, max_tokens=5)
    without = replace(good, id="without", source=0)
    given = Answers(config=ROOMY, blocks=20, model=MODEL)
    given.run([[Work(request=each) for each in (too_long, without, good)]])
    assert {given.ends[each.id].reason for each in (too_long, without)} == {FinishReason.ERROR}
    assert given.ends[good.id].reason is not FinishReason.ERROR
    decoder = Answers(config=ROOMY).run([[Work(request=good)]])
    assert decoder.ends[good.id].reason is FinishReason.ERROR
