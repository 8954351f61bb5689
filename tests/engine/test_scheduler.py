"""Scheduler against a naive simulator: tokens are hashes of (request, index), limits are tiny."""

from __future__ import annotations

import random
import zlib
from typing import Any

import pytest

from service.engine.blocks import BlockAllocator
from service.engine.cost import CostModel
from service.engine.order import WaitingOrder
from service.engine.plan import EngineConfig, Plan
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.errors import BadRequest
from service.messages import GenerationRequest
from tests.engine.harness import make_request

BLOCK_SIZE = 4


def oracle(request_id: str, index: int) -> int:
    return zlib.crc32(f"{request_id}:{index}".encode()) % 50


class Simulator:
    """Drives a scheduler and keeps a naive model: what KV each sequence has stored."""

    def __init__(
        self, config: EngineConfig, *, num_blocks: int = 64, max_model_len: int = 64
    ) -> None:
        self.config = config
        self.allocator = BlockAllocator(num_blocks, block_size=BLOCK_SIZE)
        self.scheduler = Scheduler(
            config, self.allocator, max_model_len=max_model_len, cost=CostModel()
        )
        self.stored: dict[Sequence, int] = {}
        self.answers: dict[str, list[int]] = {}
        self.admitted: list[str] = []
        self.preempted: list[str] = []

    def add(self, request: GenerationRequest, **fields: Any) -> Sequence:
        return self.scheduler.add(request, **fields)

    def step(self, now: float = 0.0) -> Plan:
        before = {sequence: sequence.preemptions for sequence in self.scheduler.running}
        plan = self.scheduler.schedule(now)
        self.scheduler.check_integrity()
        self._check_limits(plan)
        self.preempted += [s.id for s in before if s.preemptions > before[s]]
        admitted = [s for s in self.scheduler.running if before.get(s) != s.preemptions]
        self.admitted += [sequence.id for sequence in admitted]
        for sequence in admitted:
            self.stored[sequence] = sequence.num_computed
        grown = plan.sampling
        tokens = [[oracle(s.id, s.num_output)] for s in grown]
        self.scheduler.launched(plan)
        self.scheduler.update(plan, tokens)
        for sequence, num in plan.tokens.items():
            self.stored[sequence] += num
            assert self.stored[sequence] == sequence.num_computed
        for sequence in grown:
            self.answers.setdefault(sequence.id, []).append(sequence.tokens[-1])
            if not sequence.num_remaining:
                self.scheduler.finish(sequence)
        self.scheduler.check_integrity()
        return plan

    def run(self, limit: int = 2000) -> None:
        """Steps to the end; fails if there is none."""
        for _ in range(limit):
            if not self.scheduler.num_sequences:
                assert self.allocator.num_used == 0
                return
            assert self.step().tokens, "there is always one that goes on"
        raise AssertionError("a sequence waits forever")

    def _check_limits(self, plan: Plan) -> None:
        assert sum(plan.tokens.values()) == plan.num_tokens <= self.config.max_batch_tokens
        assert len(plan.tokens) <= self.config.max_sequences
        for sequence, num in plan.tokens.items():
            assert 1 <= num <= min(sequence.num_pending, self.config.prompt_chunk)
            assert sequence.num_computed + num <= len(sequence.blocks) * BLOCK_SIZE
        decoding = [s for s in self.scheduler.running if s.num_pending == 1]
        assert all(sequence in plan.tokens for sequence in decoding), "no decode waits for a prompt"


def answer(request: GenerationRequest) -> list[int]:
    return [oracle(request.id, index) for index in range(request.max_tokens)]


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(
        **{"max_batch_tokens": 8, "max_sequences": 4, "max_prompt_chunk": 6, **fields}
    )


@pytest.mark.parametrize("seed", range(40))
def test_every_request_ends_with_exactly_its_tokens(seed: int) -> None:
    draw = random.Random(seed)
    seats = draw.randint(1, 5)
    simulator = Simulator(
        config(
            max_sequences=seats,
            max_batch_tokens=seats + draw.randint(0, 6),
            max_prompt_chunk=draw.randint(1, 8),
            patience=draw.randint(0, 3),
        ),
        num_blocks=draw.randint(6, 12),
    )
    requests = [
        make_request(
            f"r{index}",
            prompt=[draw.randrange(2) for _ in range(draw.randint(1, 12))],
            max_tokens=draw.randint(1, 13),
            priority=draw.randrange(3),
            tenant=draw.choice("ab"),
            prompt_logprobs=draw.choice([None, None, 1]),
        )
        for index in range(draw.randint(1, 14))
    ]
    for request in requests:
        simulator.add(request)
        if draw.random() < 0.5:
            simulator.step()
    simulator.run()
    assert simulator.answers == {request.id: answer(request) for request in requests}


def test_priority_then_the_least_served_tenant_then_arrival() -> None:
    simulator = Simulator(config(max_sequences=1, patience=100))
    first = [("a1", "a", 1), ("a2", "a", 1), ("b1", "b", 1), ("a3", "a", 0), ("b2", "b", 1)]
    for name, tenant, priority in first:
        simulator.add(make_request(name, tenant=tenant, priority=priority, max_tokens=3))
    simulator.run()
    # a3 is of the first class; then b was served less than a; then they take turns.
    assert simulator.admitted == ["a3", "b1", "a1", "b2", "a2"]


def test_a_flood_of_one_tenant_does_not_starve_another() -> None:
    simulator = Simulator(config(max_sequences=2, patience=8))
    for index in range(40):
        simulator.add(make_request(f"flood{index}", tenant="flood", max_tokens=4))
    for _ in range(30):
        simulator.step()
    before = len(simulator.admitted)
    simulator.add(make_request("quiet", tenant="quiet", max_tokens=4))
    simulator.run()
    assert simulator.admitted.index("quiet") <= before + 1


def test_a_tenant_that_was_away_saved_nothing_up() -> None:
    simulator = Simulator(config(max_sequences=1, patience=100))
    for index in range(16):
        simulator.add(make_request(f"old{index}", tenant="old", max_tokens=8))
    for _ in range(90):  # ten of them are served meanwhile
        simulator.step()
    before = len(simulator.admitted)
    for index in range(6):
        simulator.add(make_request(f"new{index}", tenant="new", max_tokens=8))
    simulator.run()
    after = simulator.admitted[before : before + 6]
    assert 2 <= sum(name.startswith("new") for name in after) <= 4, "turns, no backlog to make up"


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_nothing_waits_for_ever(patience: int) -> None:
    """An endless stream of the first class by ever new tenants cannot keep the last class out."""
    simulator = Simulator(config(max_sequences=1, patience=patience))
    simulator.add(make_request("busy", max_tokens=2, priority=0))
    simulator.step()
    old = [make_request(f"old{index}", max_tokens=2, priority=2) for index in range(3)]
    for request in old:
        simulator.add(request)
    for index in range(60):
        simulator.add(make_request(f"new{index}", tenant=f"t{index}", max_tokens=1, priority=0))
        simulator.step()
    for index, request in enumerate(old):
        assert simulator.admitted.index(request.id) <= 1 + (index + 1) * (patience + 1)


def test_the_youngest_of_the_lowest_priority_is_preempted_and_comes_back_first() -> None:
    simulator = Simulator(config(max_sequences=3), num_blocks=10)  # two of them fit
    for name, priority in (("low-old", 2), ("low-young", 2), ("high-youngest", 0)):
        simulator.add(
            make_request(name, prompt=[ord(name[-1])] * 4, max_tokens=16, priority=priority)
        )
    while not simulator.preempted:
        simulator.step()
    simulator.add(make_request("newcomer", max_tokens=1, priority=0))
    simulator.run()
    assert simulator.preempted == ["low-young"]
    assert simulator.admitted[3:] == ["low-young", "newcomer"]


def test_of_those_preempted_the_first_to_arrive_comes_back_first() -> None:
    order = WaitingOrder[Sequence](patience=0)
    sequences = [
        Sequence(request=make_request(f"r{index}", priority=2 - index), tokens=[], arrival=index)
        for index in range(3)
    ]
    for sequence in sequences:
        order.enter(sequence)
        order.admitted(sequence)
    for sequence in reversed(sequences):
        order.put_back(sequence)
    assert len(order) == 3
    for sequence in sequences:
        assert order.peek() is sequence
        order.admitted(sequence)
    assert order.peek() is None


def test_a_stream_of_urgent_requests_does_not_displace_one_for_ever() -> None:
    """Each newcomer is of a higher class, and the pool never holds all that run. Without the rule
    that a preempted sequence counts as of the highest class it is displaced time and again.
    """
    simulator = Simulator(config(max_sequences=3), num_blocks=8)
    simulator.add(make_request("slow", prompt=range(8), max_tokens=16, priority=2))
    steps = 0
    while "slow" not in simulator.answers or len(simulator.answers["slow"]) < 16:
        if simulator.scheduler.num_waiting < 2:
            urgent = make_request(f"u{steps}", prompt=[steps % 50] * 3, max_tokens=14, priority=0)
            simulator.add(urgent)
        simulator.step()
        steps += 1
        assert steps < 300
    assert simulator.preempted.count("slow") == 1
    simulator.run()


def test_a_long_prompt_does_not_stop_those_who_decode() -> None:
    simulator = Simulator(config(max_batch_tokens=5, max_sequences=2, max_prompt_chunk=3))
    simulator.add(make_request("decoding", prompt=[1], max_tokens=12))
    simulator.step()
    simulator.add(make_request("long", prompt=range(20), max_tokens=1))
    sizes = [sorted(simulator.step().tokens.values()) for _ in range(7)]
    assert sizes == [[1, 3]] * 6 + [[1, 2]]


def test_the_deadline_takes_effect_in_the_next_step() -> None:
    simulator = Simulator(config(max_sequences=1))
    running = simulator.add(make_request("running", max_tokens=9), deadline=5.0)
    waiting = simulator.add(make_request("waiting", max_tokens=9), deadline=3.0)
    assert simulator.step(2.9).expired == []
    assert simulator.step(3.0).expired == [waiting]
    plan = simulator.step(5.0)
    assert plan.expired == [running]
    assert not plan.tokens
    assert simulator.allocator.num_used == 0


def test_what_can_never_fit_is_refused_with_the_limit() -> None:
    simulator = Simulator(config(max_model_len=30), num_blocks=5)
    simulator.add(make_request("fits", prompt=range(10), max_tokens=11))
    with pytest.raises(BadRequest, match="21 tokens"):
        simulator.add(make_request("pool", prompt=range(10), max_tokens=12))
    large = Simulator(config(max_model_len=30))
    with pytest.raises(BadRequest, match="30 tokens"):
        large.add(make_request("model", prompt=range(10), max_tokens=21))
    with pytest.raises(ValueError, match="already"):
        simulator.add(make_request("fits"))
    simulator.run()


def test_contradictory_limits_are_refused() -> None:
    for fields in (
        {"max_sequences": 9},
        {"max_sequences": 0},
        {"max_prompt_chunk": 0},
        {"patience": -1},
        {"target_gap": 0.0},
        {"max_drafts": 0},
    ):
        with pytest.raises(ValueError, match="must be"):
            config(**fields)


def test_served_counters_of_tenants_that_left_are_forgotten() -> None:
    simulator = Simulator(config(max_sequences=2))
    for index in range(50):
        simulator.add(make_request(f"r{index}", tenant=f"t{index}", max_tokens=2))
    simulator.run()
    assert simulator.scheduler._order._served == {}
