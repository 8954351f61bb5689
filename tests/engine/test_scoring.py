"""Requests that score continuations: the log probabilities of a model that reads each one alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from service.messages import FinishReason, GenerationRequest
from tests.engine.harness import Rig, expected, make_request, random_request
from tests.engine.test_laws import random_config
from tests.support.builders import at_length, slowly
from tests.support.fakes import VOCAB_SIZE, OracleRunner, OverlappedOracle, oracle_logprob


@pytest.fixture(autouse=True, params=[OracleRunner, OverlappedOracle], ids=["", "overlapped"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine runs on."""
    monkeypatch.setattr(Rig, "kind", request.param)


def scoring(name: str, *scored: tuple[int, ...], **fields: Any) -> GenerationRequest:
    """A request that scores these continuations of its prompt."""
    return make_request(
        name,
        **{
            "max_tokens": len(scored),
            "scored": scored,
            "ignore_eos": True,
            "sampling": {"seed": 0, "temperature": 0.0, "top_logprobs": 0},
            **fields,
        },
    )


def random_scoring(draw: random.Random, name: str) -> GenerationRequest:
    scored = [
        tuple(draw.choices(range(VOCAB_SIZE), k=draw.randint(1, 4)))
        for _ in range(draw.randint(1, 20))
    ]
    prompt = [draw.randrange(2)] * draw.randint(1, 14)
    return scoring(name, *scored, prompt=prompt, tenant=draw.choice("abc"))


def check(rig: Rig, request: GenerationRequest, *, known: int = 0) -> None:
    """By the oracle's definition, each continuation alone."""
    found = rig.transcripts[request.id]
    assert found.ids == [each[-1] for each in request.scored]
    assert found.logprobs == [
        oracle_logprob((*request.prompt_ids, *each[:-1]), each[-1], num_top=0)
        for each in request.scored[known:]
    ]
    assert (found.text, found.end and found.end.reason) == ("", FinishReason.LENGTH)


@pytest.mark.parametrize("seed", [*range(8), *slowly(*range(8, 12)), *at_length(*range(12, 40))])
def test_scores_are_those_of_each_continuation_alone(seed: int) -> None:
    """Whatever runs beside them, wherever an earlier engine stopped, and if others are aborted."""
    draw = random.Random(seed)
    rig = Rig(random_config(draw), num_blocks=draw.randint(11, 16), block_size=4)
    requests = [random_scoring(draw, f"s{index}") for index in range(draw.randint(1, 5))]
    others = [random_request(draw, f"r{index}") for index in range(draw.randint(0, 4))]
    waiting, known, aborted = [*requests, *others], dict[str, int](), set[str]()
    draw.shuffle(waiting)
    while waiting or rig.loop.busy:
        if waiting and draw.random() < 0.5:
            request = waiting.pop()
            done = request.scored[: draw.randint(0, len(request.scored))]
            known[request.id] = len(done) * (draw.random() < 0.3)
            rig.add(request, tokens=tuple(each[-1] for each in done[: known[request.id]]))
        if draw.random() < 0.02 and known:
            victim = draw.choice([*known])
            if rig.transcripts[victim].end is None:
                rig.loop.abort(victim)
                aborted.add(victim)
        rig.step()
    rig.check_idle()
    for request in requests:
        if request.id not in aborted:
            check(rig, request, known=known[request.id])
    for request in others:
        if request.id not in aborted:
            assert rig.transcripts[request.id].result == expected(request)


def test_the_prompt_is_computed_once() -> None:
    """It was computed by each continuation whose step began before the first one had ended."""
    rig = Rig(num_blocks=64, block_size=4)
    request = scoring("s", *((token,) for token in range(40)), prompt=range(32))
    rig.run(request)
    check(rig, request)
    assert sum(batch.num_tokens for batch in rig.batches) <= 32 + 39 * 4
    assert len(rig.batches) < 40, "several continuations share a step"


def test_a_request_is_replaced_while_its_parts_run() -> None:
    """An engine that loses a lease and claims the request again may have parts of it in a step."""
    rig = Rig(num_blocks=64, block_size=4)
    request = scoring("s", *((token, 5) for token in range(12)))
    rig.add(request)
    rig.until(lambda: len(rig.transcripts["s"].ids) >= 3)
    num = len(rig.transcripts["s"].ids)
    rig.add(request, tokens=tuple(each[-1] for each in request.scored[:num]))
    rig.run()
    check(rig, request, known=num)


@pytest.mark.parametrize("wrong", [VOCAB_SIZE, -1])
def test_a_continuation_that_the_model_does_not_have_is_refused(wrong: int) -> None:
    rig = Rig(num_blocks=64, block_size=4)
    rig.run(scoring("s", (1,), (2,), (wrong,), *((token,) for token in range(20))))
    end = rig.transcripts["s"].end
    assert end is not None
    assert (end.reason, end.error) == (FinishReason.ERROR, "invalid_token_id")
    assert end.count == len(rig.transcripts["s"].ids) <= 2


@pytest.mark.parametrize("scored", [((1,), ()), ((1,), (2,), (3,))])
def test_a_request_without_a_token_per_score_is_refused(scored: tuple[tuple[int, ...]]) -> None:
    rig = Rig(num_blocks=64, block_size=4)
    rig.run(scoring("s", *scored, max_tokens=2))
    end = rig.transcripts["s"].end
    assert end is not None
    assert (end.reason, end.error, end.count) == (FinishReason.ERROR, "invalid_value", 0)


def test_a_deadline_ends_what_is_not_scored() -> None:
    rig = Rig(num_blocks=64, block_size=4, takes=lambda _: 1.0)
    rig.add(scoring("s", *((token, 5) for token in range(96))), remaining_ms=4500)
    rig.run()
    end = rig.transcripts["s"].end
    assert end is not None
    assert end.reason is FinishReason.DEADLINE
    assert 0 < end.count == len(rig.transcripts["s"].ids) < 96


def test_others_run_beside_a_long_request() -> None:
    """Its continuations take what is free; another tenant's request waits for a few steps of one
    token each.
    """
    rig = Rig(num_blocks=64, block_size=4)
    rig.add(scoring("s", *((token % 90, 5) for token in range(600)), tenant="a"))
    rig.until(lambda: len(rig.transcripts["s"].ids) > 50)
    other = make_request("r", tenant="b", max_tokens=4)
    rig.add(other)
    before = len(rig.batches)
    rig.until(lambda: rig.ended("r"))
    assert rig.transcripts["r"].result == expected(other)
    assert len(rig.batches) - before < 25
    assert not rig.ended("s")
