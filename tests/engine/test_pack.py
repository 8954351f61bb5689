"""Packer against its slow twin: each field of each batch, rebuilt from the plan in plain Python."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model.batch import Batch, SamplingBatch, unpack_masks
from service.engine.blocks import BlockAllocator
from service.engine.cost import CostModel
from service.engine.pack import Packer
from service.engine.plan import EngineConfig, Plan
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.messages import GenerationRequest
from tests.engine.harness import Reckless, make_request, random_request

BLOCK_SIZE, NUM_BLOCKS, MODEL_LEN, VOCAB_SIZE = 4, 13, 64, 97
EOS_IDS = frozenset({96})


class Bench:
    """A scheduler and a packer; each step yields the plan and its batch."""

    def __init__(self, *, max_sequences: int = 4, drafts: random.Random | None = None) -> None:
        self.config = EngineConfig(
            max_sequences=max_sequences, max_batch_tokens=12, max_prompt_chunk=6
        )
        self.allocator = BlockAllocator(NUM_BLOCKS, block_size=BLOCK_SIZE)
        self.scheduler = Scheduler(
            self.config,
            self.allocator,
            max_model_len=MODEL_LEN,
            cost=CostModel(),
            speculator=None if drafts is None else Reckless(drafts, max_rows=12),
        )
        self.packer = Packer(
            self.config,
            block_size=BLOCK_SIZE,
            max_model_len=MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            eos_ids=EOS_IDS,
        )

    def pack(self, *requests: GenerationRequest) -> tuple[Plan, Batch]:
        for request in requests:
            self.scheduler.add(request)
        plan = self.scheduler.schedule(0.0)
        batch = self.packer.pack(plan)
        batch.check(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE)
        return plan, batch

    def update(self, plan: Plan, draw: random.Random) -> None:
        grown = plan.sampling
        drafts = [plan.drafts.get(sequence, []) for sequence in grown]
        runs = [[*d[: draw.randint(0, len(d))], draw.randrange(6)] for d in drafts]
        self.scheduler.launched(plan)
        self.scheduler.update(plan, runs)
        for sequence in grown:
            if not sequence.num_remaining:
                self.scheduler.finish(sequence)


def biases_of(sequence: Sequence) -> dict[int, float]:
    request = sequence.request
    biases = dict(request.sampling.logit_bias)
    if sequence.num_output < request.min_tokens:
        ends = {*request.stop_token_ids, *(set() if request.ignore_eos else EOS_IDS)}
        biases |= dict.fromkeys(ends, float("-inf"))
    output = sequence.tokens[sequence.num_prompt :]
    for *before, last in request.sampling.banned:
        if output[len(output) - len(before) :] == before:
            biases[last] = float("-inf")
    return biases


def penalties_of(sequence: Sequence) -> dict[int, int]:
    params, prompt = sequence.request.sampling, list(sequence.request.prompt_ids)
    answer = sequence.tokens[len(prompt) :]
    if params.repetition_penalty != 1.0:
        return {token: answer.count(token) for token in {*prompt, *answer}}
    if params.presence_penalty or params.frequency_penalty:
        return {token: answer.count(token) for token in answer}
    return {}


def check_layout(plan: Plan, batch: Batch) -> None:
    start = 0
    scores = []
    samples = []
    for row, (sequence, num) in enumerate(plan.tokens.items()):
        first, last = sequence.num_computed, sequence.num_computed + num
        assert batch.query_starts_S1[row : row + 2].tolist() == [start, start + num]
        tokens = sequence.tokens + plan.drafts.get(sequence, [])
        assert batch.tokens_T[start : start + num].tolist() == tokens[first:last]
        assert batch.positions_T[start : start + num].tolist() == list(range(first, last))
        assert batch.context_lens_S[row] == last
        assert batch.batch_slots_S[row] == sequence.batch_slot
        table = batch.block_table_SB[row].tolist()
        assert table == (sequence.blocks + [0] * len(table))[: len(table)]
        samples += [
            start + position - first
            for position in range(first, last)
            if position >= sequence.num_tokens - 1
        ]
        scores += [
            (start + position - first, sequence.tokens[position + 1])
            for position in range(first, last)
            if sequence.scores_prompt and position + 1 < sequence.num_prompt
        ]
        start += num
    assert batch.sample_rows_R.tolist() == samples
    assert list(zip(batch.score_rows_Q, batch.score_ids_Q, strict=True)) == scores


def rows_of(plan: Plan) -> list[Sequence]:
    """Per sampling row, its sequence as if the drafts before it had been accepted."""
    return [
        replace(sequence, tokens=sequence.tokens + drafts[:num])
        for sequence in plan.sampling
        for drafts in [plan.drafts.get(sequence, [])]
        for num in range(len(drafts) + 1)
    ]


def check_sampling(sequences: list[Sequence], sampling: SamplingBatch) -> None:
    params = [sequence.request.sampling for sequence in sequences]
    exact: dict[str, list[Any]] = {
        "seeds_R": [p.seed for p in params],
        "choices_R": [p.choice for p in params],
        "indices_R": [sequence.num_output for sequence in sequences],
        "top_ks_R": [p.top_k or VOCAB_SIZE for p in params],
        "wants_logprobs_R": [p.top_logprobs is not None for p in params],
    }
    rounded: dict[str, list[float]] = {
        "temperatures_R": [p.temperature for p in params],
        "top_ps_R": [p.top_p for p in params],
        "min_ps_R": [p.min_p for p in params],
        "presence_R": [p.presence_penalty for p in params],
        "frequency_R": [p.frequency_penalty for p in params],
        "repetition_R": [p.repetition_penalty for p in params],
    }
    for name, values in exact.items():
        assert getattr(sampling, name).tolist() == values, name
    for name, values in rounded.items():
        assert getattr(sampling, name).tolist() == np.array(values, np.float32).tolist(), name
    assert sampling.num_top == max((p.top_logprobs or 0 for p in params), default=0)
    penalties = zip(
        sampling.penalty_rows_P.tolist(),
        sampling.penalty_ids_P.tolist(),
        sampling.penalty_counts_P.tolist(),
        strict=True,
    )
    biases = zip(
        sampling.bias_rows_E.tolist(),
        sampling.bias_ids_E.tolist(),
        sampling.bias_values_E.tolist(),
        strict=True,
    )
    assert sorted(penalties) == sorted(
        (row, *entry) for row, s in enumerate(sequences) for entry in penalties_of(s).items()
    )
    assert sorted(biases) == sorted(
        (row, *entry) for row, s in enumerate(sequences) for entry in biases_of(s).items()
    )
    masks = unpack_masks(sampling.masks_MW, VOCAB_SIZE)
    allowed = [tuple(np.flatnonzero(mask).tolist()) for mask in masks]
    assert dict(zip(sampling.mask_rows_M.tolist(), allowed, strict=True)) == {
        row: p.allowed for row, p in enumerate(params) if p.allowed
    }


@pytest.mark.slow
def test_every_field_is_what_the_plan_says() -> None:
    decodes = preemptions = drafts = 0
    for seed in range(16):
        draw = random.Random(seed)
        bench = Bench(drafts=draw if seed % 2 else None)
        waiting = [random_request(draw, f"r{index}") for index in range(10)]
        while waiting or bench.scheduler.num_sequences:
            arrivals = [waiting.pop() for _ in range(min(len(waiting), draw.randrange(3)))]
            if not arrivals and not bench.scheduler.num_sequences:
                continue
            plan, batch = bench.pack(*arrivals)
            check_layout(plan, batch)
            check_sampling(rows_of(plan), batch.sampling)
            decodes += batch.is_decode
            drafts += plan.num_drafts
            preemptions += len(plan.preempted)
            bench.update(plan, draw)
    assert min(decodes, preemptions, drafts) > 10


def test_dtypes_are_the_contract() -> None:
    request = make_request(
        sampling={"repetition_penalty": 2.0, "logit_bias": ((1, 1.0),)},
        min_tokens=2,
        prompt_logprobs=1,
    )
    for requests in ((request,), (make_request("plain"),)):
        _, batch = Bench().pack(*requests)
        sampling = batch.sampling
        fields = [(name, getattr(batch, name)) for name in Batch.__slots__]
        fields += [(name, getattr(sampling, name)) for name in SamplingBatch.__slots__]
        for name, value in fields:
            if isinstance(value, np.ndarray):
                kind = next(
                    (
                        dtype
                        for key, dtype in {
                            "seeds": np.uint64, "wants": np.bool_, "temperatures": np.float32,
                            "top_ps": np.float32, "min_ps": np.float32, "presence": np.float32,
                            "frequency": np.float32, "repetition": np.float32,
                            "bias_values": np.float32, "masks": np.uint32,
                        }.items()
                        if name.startswith(key)
                    ),
                    np.int32,
                )  # fmt: skip
                assert value.dtype == kind, name


def test_a_batch_stays_as_it_was_when_the_next_is_packed() -> None:
    """A runner may still read a step's arrays while the next is packed: none is a shared buffer."""
    bench = Bench()
    draw = random.Random(0)
    plan, batch = bench.pack(make_request(sampling={"frequency_penalty": 1.0}, max_tokens=20))
    for _ in range(6):
        bench.update(plan, draw)
        plan, batch = bench.pack()
    kept = [batch.block_table_SB.copy(), batch.sampling.penalty_counts_P.copy()]
    for _ in range(4):
        bench.update(plan, draw)
        plan, _ = bench.pack()
    assert np.array_equal(batch.block_table_SB, kept[0])
    assert np.array_equal(batch.sampling.penalty_counts_P, kept[1])


def test_a_seat_forgets_who_sat_there() -> None:
    bench = Bench(max_sequences=1)
    first = make_request(
        "first", max_tokens=1, sampling={"logit_bias": ((1, 1.0),), "repetition_penalty": 2.0}
    )
    plan, _ = bench.pack(first)
    bench.update(plan, random.Random(0))
    plan, batch = bench.pack(make_request("second"))
    assert batch.batch_slots_S.tolist() == [0]
    check_sampling(plan.sampling, batch.sampling)
