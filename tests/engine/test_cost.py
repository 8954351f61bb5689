"""CostModel: it learns what a step costs, keeps its head in noise, and chooses chunks by it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from model.batch import Batch
from service.engine.cost import CostModel, StepWork
from service.engine.plan import EngineConfig
from service.messages import GenerationRequest
from tests.engine.harness import Rig, costs, expected, make_request
from tests.support.builders import at_length

CONFIG = EngineConfig(max_batch_tokens=512, max_sequences=32, prefix_cache=False)


def truth(work: StepWork) -> float:
    """A machine like a small one: seconds."""
    return (
        0.007
        + 1.6e-4 * work.tokens
        + 2e-8 * work.products
        + 3e-7 * work.contexts
        + 4e-5 * work.sampled
    )


def random_work(draw: random.Random) -> StepWork:
    """Some decodes and, now and then, a chunk."""
    work = StepWork()
    for _ in range(draw.choice([1, 2, 4, 8, 16, 32])):
        work = work.plus(1, computed=draw.randrange(1, 3000), sampled=1)
    if draw.random() < 0.3:
        work = work.plus(draw.randint(16, 400), computed=draw.randrange(2000), sampled=0)
    return work


def test_the_sums_of_a_step() -> None:
    work = StepWork().plus(3, computed=5, sampled=0).plus(1, computed=9, sampled=1)
    assert work == StepWork(tokens=4, products=3 * 8 + 10, contexts=18, sampled=1)
    drafted = StepWork().plus(1, computed=9, sampled=1).drafted(4, context=10)
    assert drafted == StepWork().plus(5, computed=9, sampled=5)


@pytest.mark.parametrize("seed", range(4))
def test_it_learns_the_line_through_noise_and_stalls(seed: int) -> None:
    """One step in thirty stalls to up to sixty times its time, the very first one among them."""
    draw = random.Random(seed)
    cost = CostModel()
    cost.observe(StepWork(tokens=40, products=1600, contexts=40, sampled=1), 0.5)
    for _ in range(600):
        work = random_work(draw)
        stall = draw.uniform(2, 60) if draw.random() < 1 / 30 else 1.0
        cost.observe(work, truth(work) * draw.uniform(0.97, 1.05) * stall)
    errors = []
    for _ in range(200):
        work = random_work(draw)
        guess = cost.seconds(work)
        assert guess is not None
        errors.append(abs(guess / truth(work) - 1))
    assert sorted(errors)[100] < 0.08
    assert sorted(errors)[190] < 0.25


def test_where_a_fast_path_ends_no_straight_line_follows() -> None:
    def takes_twice(rows: int) -> float:
        return 0.007 if rows <= 2 else 0.014

    cost = costs(takes_twice)
    for rows in (1, 2, 4, 8, 16, 64):
        guess = cost.seconds(StepWork(rows, 50 * rows, 50 * rows, rows))
        assert guess == pytest.approx(takes_twice(rows), rel=0.2)


def test_a_stall_counts_for_little_and_a_first_one_is_forgotten() -> None:
    decode = StepWork(tokens=4, products=400, contexts=400, sampled=4)
    prompt = StepWork(tokens=200, products=40_000, contexts=200, sampled=1)
    cost = CostModel()
    for work in (prompt, prompt, prompt, decode, decode):
        cost.observe(work, 0.8)  # the machine was busy loading
    for _ in range(3):
        cost.observe(prompt, truth(prompt))
        cost.observe(decode, truth(decode))
    for work in (prompt, decode):
        assert cost.seconds(work) == pytest.approx(truth(work), rel=0.1)
        cost.observe(work, 60 * truth(work))
        assert cost.seconds(work) == pytest.approx(truth(work), rel=0.25)


def test_it_follows_a_machine_that_became_slower_or_faster() -> None:
    draw = random.Random(0)
    cost = CostModel()
    for factor in (1.0, 3.0, 0.5):
        for _ in range(400):
            work = random_work(draw)
            cost.observe(work, truth(work) * factor)
        work = StepWork().plus(200, computed=100, sampled=0).plus(1, computed=300, sampled=1)
        assert cost.seconds(work) == pytest.approx(truth(work) * factor, rel=0.15)


def test_an_hour_of_decoding_does_not_wash_out_what_prompts_cost() -> None:
    draw = random.Random(0)
    cost = CostModel()
    for _ in range(300):
        work = random_work(draw)
        cost.observe(work, truth(work))
    for index in range(3000):
        work = StepWork().plus(1, computed=index, sampled=1)
        cost.observe(work, truth(work) * draw.uniform(0.95, 1.1))
    prompt = StepWork().plus(300, computed=0, sampled=1)
    assert cost.seconds(prompt) == pytest.approx(truth(prompt), rel=0.15)


def test_it_says_nothing_before_it_saw_two_sizes() -> None:
    cost = CostModel()
    assert cost.seconds(StepWork(tokens=1)) is None
    cost.observe(StepWork(tokens=1, contexts=9, sampled=1), 0.01)
    cost.observe(StepWork(tokens=1, contexts=9, sampled=1), 0.0)
    assert cost.seconds(StepWork(tokens=1)) is None
    assert cost.chunk(StepWork(), computed=0, most=9, limit=1.0) is None
    cost.observe(StepWork(tokens=100, contexts=100, sampled=1), 0.03)
    assert cost.seconds(StepWork(tokens=100, contexts=100, sampled=1)) is not None


def test_a_chunk_is_the_largest_that_keeps_within_the_limit() -> None:
    cost = costs(lambda rows: 0.007 + 1.6e-4 * rows)
    decodes = StepWork(tokens=4, contexts=400, sampled=4)
    for limit in (0.02, 0.03, 0.06):
        num = cost.chunk(decodes, computed=100, most=500, limit=limit)
        assert num is not None
        now, one_more = (
            cost.seconds(decodes.plus(n, computed=100, sampled=0)) for n in (num, num + 1)
        )
        assert now is not None
        assert one_more is not None
        assert now <= limit < one_more
    assert cost.chunk(decodes, computed=100, most=7, limit=0.06) == 7
    assert cost.chunk(decodes, computed=100, most=500, limit=0.001) == 0


@pytest.mark.slow
def test_the_reserve_is_what_hardly_any_step_exceeds() -> None:
    """Whatever the noise looks like; and it goes when the noise goes."""
    noises: list[Callable[[random.Random], float]] = [
        lambda draw: draw.gauss(1, 0.03),
        lambda draw: draw.gauss(1, 0.1),
        lambda draw: draw.uniform(0.8, 1.2),
        lambda draw: 0.95 + draw.expovariate(1 / 0.05),
    ]
    for number, noise in enumerate(noises):
        draw, cost = random.Random(number), CostModel()
        beyond: list[bool] = []
        for index in range(4000):
            work = random_work(draw)
            seconds, guess = truth(work) * noise(draw), cost.seconds(work)
            if index > 500 and guess is not None and work.sampled < work.tokens:
                beyond.append(seconds > cost.reserve * guess)
            cost.observe(work, seconds)
        assert sum(beyond) / len(beyond) < 0.02, number
        noisy = cost.reserve
        for _ in range(1000):
            work = random_work(draw)
            cost.observe(work, truth(work))
        assert cost.reserve < 1 + (noisy - 1) / 2


def test_neither_stalls_nor_wild_noise_leave_no_room_for_chunks() -> None:
    draw = random.Random(0)
    stalling, wild = CostModel(), CostModel()
    for _ in range(2000):
        work = random_work(draw)
        stalling.observe(work, truth(work) * (60 if draw.random() < 1 / 30 else 1))
        wild.observe(work, truth(work) * draw.uniform(0.3, 3))
    assert stalling.reserve < 1.2
    assert wild.reserve == pytest.approx(1.4)


# --- in the engine ----------------------------------------------------------------------------
def takes(rows: int) -> float:
    return 0.007 + 1.6e-4 * rows


def long_prompt(name: str = "long", length: int = 2000) -> GenerationRequest:
    return make_request(name, prompt=[n % 90 for n in range(length)], max_tokens=4)


def make_rig(config: EngineConfig = CONFIG) -> Rig:
    return Rig(config, takes=takes, num_blocks=2000, max_model_len=4096)


def test_a_long_prompt_alone_uses_the_whole_budget() -> None:
    rig = make_rig()
    rig.run(long_prompt())
    assert [batch.num_tokens for batch in rig.batches[:4]] == [512, 512, 512, 464]


def test_who_decodes_waits_no_longer_than_the_target_gap_while_a_long_prompt_comes_in() -> None:
    rig = make_rig()
    decoding = make_request("decoding", prompt=[1] * 40, max_tokens=200, ignore_eos=True)
    rig.add(decoding)
    for _ in range(10):
        rig.step()
    rig.add(long_prompt())
    gaps = []
    while not rig.ended("long"):
        before = rig.now
        rig.step()
        gaps.append(rig.now - before)
    mixed = [batch.num_tokens for batch in rig.batches[10:] if batch.num_tokens > 2]
    assert max(gaps) < 0.06 * 1.15
    assert len(mixed) <= 2000 / 250, "and the time is used"
    ids = rig.transcripts["decoding"].ids
    assert ids == expected(decoding)[0][: len(ids)]


class NoisyRig(Rig):
    """Its steps take `slow_truth` with noise of a tenth."""

    def __init__(self, draw: random.Random) -> None:
        config = EngineConfig(max_sequences=16, prefix_cache=False)
        super().__init__(config, num_blocks=1400, max_model_len=4096)
        self.draw = draw

    def _ran(self, batch: Batch) -> None:
        super()._ran(batch)
        work = StepWork()
        for length, num in zip(batch.context_lens_S, np.diff(batch.query_starts_S1), strict=True):
            work = work.plus(int(num), computed=int(length - num), sampled=0)
        self.now += slow_truth(work) * self.draw.gauss(1, 0.1)


def slow_truth(work: StepWork) -> float:
    """A single slow core: far into a prompt its attention dominates."""
    return 0.005 + 4.5e-4 * work.tokens + 3.5e-7 * work.products


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *at_length(1, 2, 3)])
def test_in_noise_one_gap_in_a_hundred_exceeds_the_target_and_the_prompt_hardly_waits(
    seed: int,
) -> None:
    """Chunks chosen for the very target exceed it in every second step."""
    rig = NoisyRig(random.Random(seed))
    target, length = rig.config.target_gap, 2500
    for index in range(4):
        rig.add(make_request(f"d{index}", prompt=[index] * 20, max_tokens=1200, ignore_eos=True))
    for _ in range(20):
        rig.step()
    gaps: list[float] = []
    durations = []
    for number in range(9):
        rig.add(long_prompt(f"p{number}", length=length))
        began = rig.now
        while not rig.transcripts[f"p{number}"].ids:
            before = rig.now
            rig.step()
            gaps.append(rig.now - before)
        durations.append(rig.now - began)
    learnt = gaps[50:]
    assert len(learnt) > 250
    assert sum(gap > target for gap in learnt) <= 0.015 * len(learnt)
    assert max(durations[2:]) < 1.15 * best_duration(length, target)


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_the_reserve_leaves_a_prompt_half_of_its_time(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However unsure the durations are, and however little time the decodes leave."""
    chunks = []
    for reserve in (1.0, 100.0):
        monkeypatch.setattr(CostModel, "reserve", reserve)
        cost = costs(lambda rows: 0.001 * rows)
        rig = Rig(CONFIG, cost=cost, num_blocks=2000, max_model_len=512)
        for index in range(rows):
            rig.add(make_request(f"d{index}", prompt=[index], max_tokens=9, ignore_eos=True))
        rig.step()
        rig.add(make_request("long", prompt=[1] * 180))
        rig.step()
        chunks.append(rig.batches[-1].num_tokens - rows)
    assert 0.45 * chunks[0] < chunks[1] < 0.55 * chunks[0]


def best_duration(length: int, target: float) -> float:
    """Seconds of a prompt together with four decodes whose every step takes exactly the target."""
    decodes = StepWork()
    for _ in range(4):
        decodes = decodes.plus(1, computed=400, sampled=0)
    done = steps = 0
    while done < length:
        sizes = range(1, 500)
        fit = [n for n in sizes if slow_truth(decodes.plus(n, computed=done, sampled=0)) <= target]
        done, steps = done + max(fit), steps + 1
    return steps * target


@pytest.mark.slow
def test_a_prompt_goes_on_where_the_decodes_alone_take_too_long() -> None:
    rig = make_rig(replace(CONFIG, target_gap=0.001))
    rig.add(make_request("decoding", prompt=[1] * 40, max_tokens=300, ignore_eos=True))
    for _ in range(10):
        before = rig.now
        rig.step()
    alone = rig.now - before
    rig.add(long_prompt())
    rig.add(long_prompt("other"))
    before = rig.now
    rig.step()
    assert rig.batches[-1].num_tokens > 16, "a prompt goes on"
    assert rig.now - before < 2.3 * alone, "and at most doubles a step that is long already"
    assert rig.batches[-1].num_tokens < 512, "so that it is not the whole budget"
    rig.run()


def test_before_anything_is_known_a_chunk_is_modest() -> None:
    rig = Rig(CONFIG, num_blocks=2000, max_model_len=4096)  # a clock that stands still
    rig.add(make_request("decoding", max_tokens=60, ignore_eos=True))
    rig.step()
    rig.add(long_prompt())
    rig.add(long_prompt("other"))
    rig.step()
    assert rig.batches[-1].num_tokens == 1 + 128


def test_a_stall_does_not_shrink_the_chunks() -> None:
    """The machine stands still for a second in a step of each kind."""
    rig = make_rig()
    rig.add(make_request("decoding", prompt=[1] * 40, max_tokens=400, ignore_eos=True))
    sizes = []
    for number in range(8):
        rig.until(lambda: rig.loop._scheduler.num_sequences == 1)
        rig.add(long_prompt(f"p{number}", length=900))
        rig.step()
        sizes.append(rig.batches[-1].num_tokens)
        if number in {3, 5}:
            rig.takes = lambda _rows: 1.0
        rig.step()  # a chunk
        rig.until(lambda: rig.loop._scheduler.num_sequences == 1)
        rig.step()  # a decode
        rig.takes = takes
    assert sizes[2] > 250
    assert min(sizes[3:]) > 0.8 * sizes[2]
