"""Overlapped steps: when one is launched ahead, what that wastes, and which must be read first."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from service.engine.pipeline import Pipeline
from service.engine.plan import Plan
from service.messages import GenerationRequest
from tests.engine.harness import CONFIG, Rig, expected, make_request, random_request
from tests.support.fakes import (
    VOCAB_SIZE,
    DeferringOracle,
    OracleRunner,
    OverlappedOracle,
)


def overlapped_rig(**fields: Any) -> tuple[Rig, OverlappedOracle]:
    rig = Rig(kind=OverlappedOracle, **fields)
    assert isinstance(rig.runner, OverlappedOracle)
    return rig, rig.runner


def long(name: str, **fields: Any) -> GenerationRequest:
    return make_request(name, **{"max_tokens": 12, "ignore_eos": True, **fields})


def rows(rig: Rig) -> int:
    return sum(batch.num_tokens for batch in rig.batches)


def test_steps_overlap_and_the_last_token_is_known_beforehand() -> None:
    """An answer that ends at its limit wastes nothing: the limit is known before the token."""
    requests = [long(f"r{index}", prompt=range(index, index + 5)) for index in range(4)]
    rig, runner = overlapped_rig()
    plain = Rig()
    for each in (rig, plain):
        transcripts = each.run(*requests)
        assert [transcripts[r.id].result for r in requests] == [expected(r) for r in requests]
    assert runner.most_ahead == 2
    assert rows(rig) == rows(plain)
    assert rig.total("num_sampled") == plain.total("num_sampled") == 4 * 12


@pytest.mark.slow
def test_an_end_that_nobody_could_know_wastes_one_row() -> None:
    ends = {True: 0, False: 0}
    for seed in range(150):
        request = random_request(random.Random(seed), "r")
        if request.sampling.penalises or request.sampling.allowed:
            continue
        rig, _ = overlapped_rig()
        plain = Rig()
        result = rig.run(request)["r"].result
        assert result == plain.run(request)["r"].result == expected(request)
        early = len(result[0]) < request.max_tokens
        assert rows(rig) == rows(plain) + early
        ends[early] += 1
    assert min(ends.values()) >= 5, "both kinds of end were among them"


@pytest.mark.parametrize(
    "sampling",
    [{"presence_penalty": 0.5}, {"frequency_penalty": -0.5}, {"repetition_penalty": 1.1}],
)
def test_who_chooses_by_the_token_before_is_read_first(sampling: dict[str, float]) -> None:
    request = long("penalised", sampling=sampling)
    rig, runner = overlapped_rig()
    assert rig.run(request)["penalised"].result == expected(request)
    assert runner.most_ahead == 1
    rig.run(long("other"))
    assert runner.most_ahead == 2


def test_penalties_wait_for_no_token_if_the_runner_samples_later() -> None:
    """Alone, too. A text of few tokens, so that the one in flight is often counted already."""
    penalties = {"presence_penalty": 0.5, "repetition_penalty": 1.1}
    few = {"logit_bias": tuple((token, -np.inf) for token in range(4, VOCAB_SIZE))}
    for number in range(9):
        request = long(
            f"r{number}",
            prompt=[number] * 3,
            max_tokens=20,
            sampling=penalties | few | {"seed": number},
        )
        rig = Rig(kind=DeferringOracle)
        assert rig.run(request)[request.id].result == expected(request)
        assert cast("DeferringOracle", rig.runner).most_ahead == 2
    banned = replace(request, sampling=replace(request.sampling, banned=((1, 2),)))
    rig = Rig(kind=DeferringOracle)
    assert rig.run(banned)[banned.id].result == expected(banned)
    assert cast("DeferringOracle", rig.runner).most_ahead == 2


def test_what_depends_on_tokens_waits_for_none_if_the_runner_samples_later() -> None:
    """Beside others, and from the first token on, which has nobody before it."""
    bans = {"banned": ((1, 2), (2, 3), (3, 1, 1))}
    ways: list[dict[str, Any]] = [
        {"allowed": (1, 2, 3, 5)},
        {"allowed": (1, 2, 3), **bans},
        {**bans, "presence_penalty": 0.5, "logit_bias": ((4, -np.inf),)},
        {},
    ]
    requests = [
        long(f"r{number}", prompt=[number] * 3, max_tokens=20, min_tokens=5, sampling=way)
        for number, way in enumerate(ways)
    ]
    requests = [replace(each, ignore_eos="allowed" in str(each)) for each in requests]
    rig = Rig(kind=DeferringOracle)
    transcripts = rig.run(*requests)
    assert [transcripts[r.id].result for r in requests] == [expected(r) for r in requests]
    runner = cast("DeferringOracle", rig.runner)
    assert runner.most_ahead == 2
    assert runner.num_deferred > 10


def test_a_sequence_that_lost_its_seat_unread_comes_back_with_its_token() -> None:
    """Two that need more blocks than there are: the younger one gives way, again and again."""
    requests = [long(f"r{index}", prompt=[index] * 9, max_tokens=20) for index in range(3)]
    rig, runner = overlapped_rig(num_blocks=9)
    transcripts = rig.run(*requests)
    assert [transcripts[r.id].result for r in requests] == [expected(r) for r in requests]
    assert rig.total("preemptions") > 0
    assert runner.most_ahead == 2


def test_every_step_is_told_once_and_in_order() -> None:
    rig, _ = overlapped_rig()
    requests = [long(f"r{index}", prompt=range(20)) for index in range(3)]
    rig.run(*requests)
    told = [report.num_tokens for report in rig.reports if report.num_tokens]
    assert told == [batch.num_tokens for batch in rig.batches]
    assert rig.loop.steps == len(rig.batches)
    assert rig.total("prompt_tokens") + rig.total("prefix_hit_tokens") == 3 * 20


def test_a_step_takes_from_the_end_of_the_one_before() -> None:
    """Durations add up to the time that passed: none counts twice, none is forgotten."""
    for kind in (OracleRunner, OverlappedOracle):
        rig = Rig(CONFIG, kind=kind, takes=lambda rows: 0.25 * rows)
        for number, requests in enumerate(((long("a"), long("b")), (long("c"),), (long("d"),))):
            for request in requests:
                rig.add(request)
            while rig.loop.busy:  # no step more than the engine's thread would do
                rig.step()
            assert rig.total("duration") == pytest.approx(rig.now - 1000 * number)
            rig.now += 1000  # it idles


def test_only_the_oldest_step_is_read() -> None:
    rig, runner = overlapped_rig()
    rig.add(long("r"))
    rig.step()
    pipeline: Pipeline = rig.loop._pipeline
    assert (len(pipeline), len(runner._under_way), pipeline.most_ahead) == (1, 1, 1)
    assert rig.loop.busy
    rig.loop.abort("r")
    rig.step()
    assert (len(pipeline), rig.transcripts["r"].ids) == (0, [])
    rig.check_idle()


def test_the_last_token_takes_no_block() -> None:
    """Its KV is never stored, so a request may need every block of the pool and one token more."""
    request = long("all", prompt=range(24), max_tokens=9)
    rig, _ = overlapped_rig(num_blocks=8, block_size=4)
    assert rig.run(request)["all"].result == expected(request)
    assert rig.total("preemptions") == 0
    assert rows(rig) == 24 + 8


@pytest.mark.parametrize("tenants", [("a", "a"), ("a", "b")])
def test_nobody_takes_a_seat_before_its_token_is_read(tenants: tuple[str, str]) -> None:
    rig, _ = overlapped_rig(config=replace(CONFIG, prefix_cache=False))
    requests = [long(f"r{tenant}{at}", tenant=tenant) for at, tenant in enumerate(tenants)]
    for request in requests:
        rig.add(request)
    rig.step()
    scheduler = rig.loop._scheduler
    lost = scheduler.running[0]
    assert lost.num_unread == 1
    scheduler._preempt(Plan(), lost)
    plan = scheduler.schedule(0.0)
    assert lost not in plan.tokens
    assert lost.batch_slot is None
    rig.run()
    assert [rig.transcripts[r.id].result for r in requests] == [expected(r) for r in requests]
