"""Speculation: the same answers in fewer steps, and only if that saves time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from model.batch import Batch, Bools, StepOutput
from model.runners import StepHandle
from service.engine.cost import CostModel, StepWork
from service.engine.lookup import Lookup
from service.engine.plan import EngineConfig
from service.engine.speculate import accepted, may_speculate
from service.messages import GenerationRequest
from tests.engine.harness import (
    Rig,
    costs,
    expected,
    make_request,
    random_request,
    renamed,
)
from tests.support.fakes import OracleRunner, Overlapping

CONFIG = EngineConfig(max_batch_tokens=64, max_sequences=6, target_gap=10.0)
PLAIN = replace(CONFIG, speculate=False)
ROOMY = replace(CONFIG, max_sequences=32)  # if steps overlap, it is the limit of their drafts


class CopyingOracle(OracleRunner):
    """Repeats the token of a dozen tokens ago three times of four; else samples as the oracle."""

    period = 12
    copies = 4  # of so many tokens all but one

    def run(self, batch: Batch) -> StepOutput:
        output = super().run(batch)
        sampling = batch.sampling
        for index, row in enumerate(batch.sample_rows_R.tolist()):
            tokens = self._context(batch, row)
            if len(tokens) < self.period or not output.tokens_R[index] % self.copies:
                continue
            if tokens[-self.period] not in sampling.bias_ids_E[sampling.bias_rows_E == index]:
                output.tokens_R[index] = tokens[-self.period]
        return output

    def _context(self, batch: Batch, row: int) -> list[int]:
        owner = int(np.searchsorted(batch.query_starts_S1, row, side="right")) - 1
        slots = self._pool[batch.block_table_SB[owner]].ravel()
        return [int(token) for token in slots[: batch.positions_T[row] + 1]]


class Parrot(CopyingOracle):
    """Copies nearly always."""

    period = 24
    copies = 50


class Babbler(OracleRunner):
    """Every pair of tokens occurred before, followed by another token each time."""

    def run(self, batch: Batch) -> StepOutput:
        output = super().run(batch)
        return replace(output, tokens_R=output.tokens_R % 6)


# --- what holds of the sampled tokens ---------------------------------------------------------
@pytest.mark.parametrize(
    ("drafts", "sampled", "num"),
    [([], [5], 1), ([5], [5, 6], 2), ([4], [5, 6], 1), ([5, 6, 7], [5, 6, 8, 7], 3)],
)
def test_a_run_ends_with_the_first_token_that_is_not_its_draft(
    drafts: list[int], sampled: list[int], num: int
) -> None:
    assert accepted(drafts, sampled) == num


def slow_find(tokens: list[int]) -> tuple[int, int]:
    """The twin: compares every earlier place."""
    found = (0, 0)
    for place in range(len(tokens) - 1):
        length = 0
        while length < min(8, place + 1) and tokens[place - length] == tokens[-1 - length]:
            length += 1
        if length >= max(2, found[1]):
            found = (place, length)
    return found


def test_look_up_finds_what_comparing_every_place_finds() -> None:
    """With at most four earlier places of a pair, and any number of tokens between two looks."""
    found = 0
    for seed in range(300):
        draw = random.Random(seed)
        tokens = [draw.randrange(7)]
        lookup = Lookup()
        for _ in range(12):
            tokens += [draw.randrange(7) for _ in range(draw.randint(1, 3))]
            pairs = list(pairwise(tokens))
            if pairs.count(pairs[-1]) <= 5:
                assert lookup.find(tokens) == slow_find(tokens)
                found += slow_find(tokens)[1] > 1
    assert found > 300


# --- the answer -------------------------------------------------------------------------------
class OverlappedCopies(Overlapping, CopyingOracle):
    """The same, one step ahead."""


class OverlappedParrot(Overlapping, Parrot):
    """Likewise."""


def run(
    requests: list[GenerationRequest],
    config: EngineConfig,
    *,
    num_blocks: int = 64,
    kind: type[OracleRunner] = CopyingOracle,
) -> Rig:
    cost = costs(lambda rows: 0.01 + rows * 1e-6)
    engine = Rig(config, kind=kind, cost=cost, num_blocks=num_blocks)
    engine.run(*requests)
    return engine


def doubled(request: GenerationRequest, *, max_tokens: int) -> GenerationRequest:
    """With something to copy in the prompt, and more room to do so."""
    prompt = request.prompt_ids[-12:] * 2
    return replace(request, prompt_ids=prompt, max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CopyingOracle, OverlappedCopies], ids=["", "overlapped"])
def test_with_equals_without(kind: type[OracleRunner]) -> None:
    """All parameters, shared prefixes and a pool so small that some are preempted. Each request
    alone and without speculation gives the expected output.
    """
    taken = preemptions = hits = 0
    for seed in range(8):
        draw = random.Random(seed)
        requests = [
            doubled(random_request(draw, f"r{index}"), max_tokens=draw.randint(8, 38))
            for index in range(6)
        ]
        found = run(requests, ROOMY, num_blocks=22, kind=kind)
        for request in requests:
            alone = run([request], PLAIN).transcripts[request.id]
            assert found.transcripts[request.id].result == alone.result
            assert found.transcripts[request.id].logprobs == alone.logprobs
            assert found.transcripts[request.id].prompt_logprobs == alone.prompt_logprobs
        taken += found.total("num_accepted")
        preemptions += found.total("preemptions")
        hits += found.total("prefix_hit_tokens")
    assert taken >= 100
    assert min(preemptions, hits) >= 10


def test_a_take_over_in_the_middle_of_a_copy() -> None:
    request = make_request(prompt=[1, 2, 3, 4, 5] * 2, max_tokens=40, ignore_eos=True)
    whole = run([request], PLAIN).transcripts["r"].ids
    for num in (1, 7, 20, 39):
        engine = Rig(CONFIG, kind=CopyingOracle, cost=costs(lambda rows: 0.01 + rows * 1e-6))
        engine.add(request, tokens=tuple(whole[:num]))
        engine.run()
        assert engine.transcripts["r"].ids == whole


@pytest.mark.slow
def test_an_end_inside_an_accepted_run_ends_there() -> None:
    """Every draft is right, so that each kind of end comes in the middle of some run."""
    inside = 0
    for seed in range(80):
        request = random_request(random.Random(seed), "r")
        rig = Rig(CONFIG, reckless=random.Random(seed))
        assert rig.reckless is not None
        rig.reckless.right = 1.0
        assert rig.run(request)["r"].result == expected(request)
        last = [report for report in rig.reports if report.num_tokens][-1]
        inside += 1 < last.num_sampled <= last.num_drafts
    assert inside >= 10


def test_the_prefix_cache_holds_no_draft_that_did_not_come_true() -> None:
    """Wrong drafts fill whole blocks; the next turn finds the answer's blocks, and it is right."""
    first = make_request(prompt=range(6), max_tokens=20, ignore_eos=True)
    rig = Rig(reckless=random.Random(1))
    assert rig.reckless is not None
    rig.reckless.right = 0.4
    ids = rig.run(first)["r"].ids
    assert rig.total("num_drafts") > rig.total("num_accepted") + 12
    turn = make_request("turn", prompt=[*range(6), *ids, 5], max_tokens=4)
    assert rig.run(turn)["turn"].result == expected(turn)
    assert rig.total("prefix_hit_tokens") == 24


def test_drafts_displace_nobody() -> None:
    """A pool that just holds all: no preemption with drafts either."""
    requests = [
        make_request(f"r{index}", prompt=[index] * 8, max_tokens=17, ignore_eos=True)
        for index in range(3)
    ]
    rig = Rig(num_blocks=18, reckless=random.Random(0))  # 24 slots each
    rig.run(*requests)
    assert rig.total("preemptions") == 0
    assert rig.total("num_drafts") > 10
    assert all(rig.transcripts[r.id].result == expected(r) for r in requests)


@pytest.mark.slow
def test_wrong_drafts_take_no_block_that_another_will_need() -> None:
    """Two that just fit until the shorter ends; a block lent to a draft would displace it."""
    drafts = 0
    for seed in range(10):
        rig = Rig(num_blocks=6, reckless=random.Random(seed))
        assert rig.reckless is not None
        rig.reckless.right = 0.0
        rig.run(
            make_request("long", prompt=[1] * 4, max_tokens=20, ignore_eos=True),
            make_request("short", prompt=[2] * 4, max_tokens=8, ignore_eos=True),
        )
        assert rig.total("preemptions") == 0
        drafts += rig.total("num_drafts")
    assert drafts > 100


def test_no_draft_stands_where_no_token_can_come() -> None:
    """The last token of an answer is never computed, so no draft stands there or beyond."""
    rig = Rig(CONFIG, kind=Parrot, cost=costs(lambda rows: 0.01 + rows * 1e-6))
    rig.run(make_request(prompt=[*range(24)] * 2, max_tokens=16, ignore_eos=True))
    assert rig.total("num_accepted") >= 8
    assert max(batch.positions_T.max() for batch in rig.batches) == 48 + 16 - 2


def test_nothing_is_kept_of_sequences_that_are_over() -> None:
    rig = run([make_request(f"r{i}", prompt=[1, 2] * 6) for i in range(5)], CONFIG)
    rig.add(make_request("gone", prompt=[1, 2] * 6, max_tokens=30, ignore_eos=True))
    for _ in range(4):
        rig.step()
    rig.loop.abort("gone")
    rig.step()
    speculator = rig.loop._scheduler._speculator
    assert speculator is not None
    assert not speculator._tracks


def test_a_step_of_nothing_is_not_weighed() -> None:
    """Broke when all cost was learnt to lie in tokens and contexts: an empty step costs 0 then, and
    the rate of tokens divided by it. The model here knows no constant.
    """

    class NoConstant(CostModel):
        def seconds(self, work: StepWork) -> float:
            return 0.001 * work.tokens

    rig = Rig(CONFIG, cost=NoConstant())
    rig.run(make_request(max_tokens=3))
    assert not rig.reports[-1].num_tokens


# --- which runners qualify -----------------------------------------------------------------
def test_only_where_rows_do_not_depend_on_their_number() -> None:
    assert may_speculate(CONFIG, exact=True)
    assert not may_speculate(CONFIG, exact=False)
    assert not may_speculate(PLAIN, exact=True)


def test_a_runner_that_rounds_by_shape_gets_no_drafts() -> None:
    class Rounding(Parrot):
        exact = False

    for kind, some in ((Parrot, True), (Rounding, False)):
        rig = Rig(CONFIG, kind=kind, cost=costs(lambda rows: 0.01 + rows * 1e-6))
        rig.run(make_request(prompt=[1, 2, 3] * 4, max_tokens=30, ignore_eos=True))
        assert bool(rig.total("num_drafts")) is some


# --- the time it takes ------------------------------------------------------------------------
def flat(rows: int) -> float:
    """Rows are nearly free, as in a step bound by memory."""
    return 0.007 + 0.00015 * rows


def steep(rows: int) -> float:
    """Every row costs its full price."""
    return 0.0005 + 0.002 * rows


def jump(rows: int) -> float:
    """A fast path for few rows ends."""
    return (0.007 if rows <= 2 else 0.014) + 0.0001 * rows


@dataclass
class Clock:
    """Of a host."""

    now: float = 0.0


class Device(Overlapping, OracleRunner):
    """Computes beside the host, whose clock stands still except for `host` seconds per launch."""

    def __init__(
        self, *, clock: Clock, takes: Callable[[int], float], host: float, **fields: Any
    ) -> None:
        super().__init__(**fields)
        self._clock, self._takes, self._host = clock, takes, host
        self._ends = deque([0.0])  # of the steps in flight, after that of the latest one read

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        self._clock.now += self._host
        begin = max(self._ends[-1], self._clock.now)
        self._ends.append(begin + self._takes(batch.num_tokens))
        return super().launch(batch, unread_T=unread_T)

    def collect(self, handle: StepHandle) -> StepOutput:
        self._ends.popleft()
        self._clock.now = max(self._clock.now, self._ends[0])
        return super().collect(handle)


class BabblingDevice(Device, Babbler):
    """A device in place of the blocking runner."""


class ParrotDevice(Device, Parrot):
    """Likewise."""


def on_device(
    kind: type[Device],
    takes: Callable[[int], float],
    *,
    clients: int,
    speculate: bool,
    host: float = 0.001,
) -> float:
    """As `duration`, of a runner whose steps overlap."""
    config = EngineConfig(max_batch_tokens=256, max_sequences=64, speculate=speculate)
    clock = Clock()
    rig = Rig(
        config,
        kind=partial(kind, clock=clock, takes=takes, host=host),  # type: ignore[arg-type]
        clock=lambda: clock.now,
        num_blocks=4000 // 4,
        max_model_len=512,
    )
    rig.run(*copies(clients))
    return clock.now


def copies(clients: int) -> list[GenerationRequest]:
    draw = random.Random(3)
    prompt = [draw.randrange(90) for _ in range(24)] * 2
    base = make_request(prompt=prompt, max_tokens=200 if clients == 1 else 60, ignore_eos=True)
    return [
        replace(renamed(base, f"r{index}"), prompt_ids=tuple(t + index % 6 for t in prompt))
        for index in range(clients)
    ]


def duration(
    kind: type[OracleRunner], takes: Callable[[int], float], *, clients: int, speculate: bool
) -> float:
    """Seconds of the engine's clock from knowing nothing to the end."""
    config = EngineConfig(max_batch_tokens=256, max_sequences=32, speculate=speculate)
    rig = Rig(config, kind=kind, takes=takes, num_blocks=4000 // 4, max_model_len=512)
    rig.run(*copies(clients))
    return rig.now


@pytest.mark.slow
@pytest.mark.parametrize("takes", [flat, steep, jump])
@pytest.mark.parametrize(
    ("kind", "clients"), [(OracleRunner, 1), (Babbler, 1), (Babbler, 8), (Parrot, 1)]
)
def test_nothing_is_slowed_down(
    takes: Callable[[int], float], kind: type[OracleRunner], clients: int
) -> None:
    plain = duration(kind, takes, clients=clients, speculate=False)
    assert plain / duration(kind, takes, clients=clients, speculate=True) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "least"), [(1, 2.0), (8, 1.5)])
def test_copies_come_faster(clients: int, least: float) -> None:
    plain = duration(Parrot, flat, clients=clients, speculate=False)
    assert plain / duration(Parrot, flat, clients=clients, speculate=True) > least


@pytest.mark.slow
@pytest.mark.parametrize("takes", [flat, steep, jump])
@pytest.mark.parametrize("host", [0.0005, 0.006])
@pytest.mark.parametrize(
    ("kind", "clients"), [(Device, 1), (BabblingDevice, 1), (BabblingDevice, 8), (ParrotDevice, 1)]
)
def test_nothing_is_slowed_down_by_reading_first(
    takes: Callable[[int], float], host: float, kind: type[Device], clients: int
) -> None:
    """A step that is read before the next plan makes the device wait for the host, nearly as long
    as a step takes.
    """
    plain = on_device(kind, takes, clients=clients, speculate=False, host=host)
    assert plain / on_device(kind, takes, clients=clients, speculate=True, host=host) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "least"), [(1, 1.8), (4, 1.3)])
def test_copies_come_faster_from_a_device(clients: int, least: float) -> None:
    plain = on_device(ParrotDevice, flat, clients=clients, speculate=False)
    assert plain / on_device(ParrotDevice, flat, clients=clients, speculate=True) > least


def test_drafts_are_read_before_the_step_after_them_is_planned() -> None:
    """And steps without drafts overlap all the same."""
    request = make_request(prompt=[*range(24)] * 2, max_tokens=100, ignore_eos=True)
    cost = costs(lambda rows: 0.01 + rows * 1e-6)
    rig = Rig(ROOMY, kind=OverlappedParrot, cost=cost, num_blocks=64, max_model_len=512)
    plain = Rig(PLAIN, kind=Parrot, num_blocks=64, max_model_len=512)
    assert len(rig.run(request)["r"].ids) == 100
    assert rig.transcripts["r"].ids == plain.run(request)["r"].ids
    assert rig.total("num_accepted") > 20
    assert isinstance(rig.runner, OverlappedParrot)
    assert rig.runner.most_ahead == 2
