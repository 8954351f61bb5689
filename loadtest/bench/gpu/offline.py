"""Offline generation directly on a runner: fixed lengths, no end token, one step ahead of the host.

The scheduling is minimal: all sequences are admitted at the start; each step decodes one token per
sequence and computes prompt chunks up to the budget. The cost of the service's engine is measured
by running the same workload through it.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from model.batch import Batch, SamplingBatch
from model.runners import OverlappedRunner, StepHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompt and output lengths, one pair per sequence."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    temperature: float = 0.6
    top_p: float = 1.0

    @property
    def tokens_in(self) -> int:
        return sum(prompt for prompt, _ in self.lengths)

    @property
    def tokens_out(self) -> int:
        return sum(output for _, output in self.lengths)


def w1(*, sequences: int = 256, least: int = 100, most: int = 1024) -> Workload:
    """nano-vllm's benchmark: the same lengths, drawn in the same order from seed 0."""
    generator = random.Random(0)
    prompts = []
    for _ in range(sequences):
        length = generator.randint(least, most)
        for _ in range(length):  # nano-vllm draws the prompt's tokens here
            generator.randint(0, 10000)
        prompts.append(length)
    outputs = [generator.randint(least, most) for _ in range(sequences)]
    return Workload(name="W1", lengths=tuple(zip(prompts, outputs, strict=True)))


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Results of a run."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    kv_tokens: int = 0  # context lengths, summed over steps
    host_seconds: list[float] = field(default_factory=list)  # of each decode step's launch
    prompt_host_seconds: list[float] = field(default_factory=list)  # of each other step's


@dataclass(slots=True, kw_only=True)
class _Sequence:
    slot: int
    blocks: range
    prompt: int
    total: int  # positions to compute: all but the last output token
    computed: int = 0
    sampled: int = 0


class Offline:
    """Runs workloads on one runner, whose pool must hold all sequences."""

    def __init__(self, runner: OverlappedRunner, *, budget: int) -> None:
        self._runner = runner
        self._budget = budget

    def run(
        self,
        workload: Workload,
        *,
        start_at: int = 0,
        around: Callable[[Callable[[], StepHandle]], StepHandle] | None = None,
    ) -> Outcome:
        """Runs the workload. `start_at`: positions of each prompt that count as computed."""
        waiting = self._allocate(workload, start_at)
        outcome = Outcome()
        flying: deque[StepHandle] = deque()
        began = time.perf_counter()
        while going := [s for s in waiting if s.computed < s.total]:
            plan = self._plan(going)
            batch, unread = self._batch(plan, workload)
            launched = time.perf_counter()

            def launch(batch: Batch = batch, unread: np.ndarray = unread) -> StepHandle:
                return self._runner.launch(batch, unread_T=unread)

            flying.append(launch() if around is None else around(launch))
            times = outcome.host_seconds if batch.is_decode else outcome.prompt_host_seconds
            times.append(time.perf_counter() - launched)
            for sequence, count in plan:
                sequence.computed += count
                sequence.sampled += sequence.computed >= sequence.prompt
                outcome.kv_tokens += sequence.computed
            outcome.steps += 1
            if len(flying) == 2:
                outcome.tokens += len(self._runner.collect(flying.popleft()).tokens_R)
        while flying:
            outcome.tokens += len(self._runner.collect(flying.popleft()).tokens_R)
        outcome.seconds = time.perf_counter() - began
        return outcome

    def _allocate(self, workload: Workload, start_at: int) -> list[_Sequence]:
        sequences: list[_Sequence] = []
        at = 0
        for slot, (prompt, output) in enumerate(workload.lengths):
            total = prompt + output - 1
            blocks = -(-total // self._runner.block_size)
            sequences.append(
                _Sequence(
                    slot=slot,
                    blocks=range(at, at + blocks),
                    prompt=prompt,
                    total=total,
                    computed=min(start_at, prompt - 1),
                )
            )
            at += blocks
        if at > self._runner.num_blocks:
            raise ValueError(
                f"the workload needs {at} blocks, the pool has {self._runner.num_blocks}"
            )
        return sequences

    def _plan(self, going: Sequence[_Sequence]) -> list[tuple[_Sequence, int]]:
        plan = [(s, 1) for s in going if s.computed >= s.prompt]
        left = self._budget - len(plan)
        for sequence in going:
            count = min(sequence.prompt - sequence.computed, left)
            if count > 0:
                plan.append((sequence, count))
                left -= count
        return plan

    def _batch(
        self, plan: Sequence[tuple[_Sequence, int]], workload: Workload
    ) -> tuple[Batch, np.ndarray]:
        sequences = [sequence for sequence, _ in plan]
        counts = np.array([count for _, count in plan], np.int32)
        computed = np.array([s.computed for s in sequences], np.int32)
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        contexts = computed + counts
        width = -(-int(contexts.max()) // self._runner.block_size)
        table = np.zeros((len(plan), width), np.int32)
        for row, sequence in enumerate(sequences):
            own = sequence.blocks[:width]
            table[row, : len(own)] = own
        samples = np.array([s.computed + n >= s.prompt for s, n in plan])
        positions = np.arange(starts[-1], dtype=np.int32) + np.repeat(
            computed - starts[:-1], counts
        )
        unread = np.repeat(computed >= [s.prompt for s in sequences], counts)
        batch = Batch(
            tokens_T=(positions * 7919 % self._runner.config.vocab_size).astype(np.int32),
            positions_T=positions,
            query_starts_S1=starts,
            context_lens_S=contexts,
            block_table_SB=table,
            batch_slots_S=np.array([s.slot for s in sequences], np.int32),
            sample_rows_R=starts[1:][samples] - 1,
            sampling=self._columns([s for s, n in plan if s.computed + n >= s.prompt], workload),
            score_rows_Q=np.zeros(0, np.int32),
            score_ids_Q=np.zeros(0, np.int32),
        )
        return batch, unread

    def _columns(self, sequences: Sequence[_Sequence], workload: Workload) -> SamplingBatch:
        plain = SamplingBatch.plain(
            len(sequences),
            vocab_size=self._runner.config.vocab_size,
            temperature=workload.temperature,
            seeds_R=np.array([s.slot for s in sequences], np.uint64),
            indices_R=np.array([s.sampled for s in sequences], np.int32),
        )
        return replace(plain, top_ps_R=np.full_like(plain.top_ps_R, workload.top_p))
