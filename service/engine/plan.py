"""Plan: the scheduler's decision for one step. EngineConfig and StepBudget: its limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from model.compression import Compression
from service.engine.cost import CostModel, StepWork
from service.engine.guide import Guide
from service.engine.sequence import Sequence, Source

UNMEASURED_CHUNK = 128  # prompt tokens in a step with decodes, before durations are known
LEAST_CHUNK = 16  # a prompt makes progress even if the decodes alone exceed the target gap


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of a step. Raises ValueError if they contradict one another."""

    max_batch_tokens: int = 512  # of a step
    max_sequences: int = 64  # batch slots
    max_prompt_chunk: int | None = None  # of one sequence in a step; None: max_batch_tokens
    target_gap: float = 0.06  # seconds between tokens while prompts are computed
    max_model_len: int | None = None  # tokens of prompt and output; None: the model's own
    patience: int = 8  # see `order`
    prefix_cache: bool = True
    speculate: bool = True  # if the runner allows it: see `speculate.may_speculate`
    max_drafts: int = 15  # of one sequence in a step
    kv_compression: Compression | None = None  # the runner's

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequences <= self.max_batch_tokens:
            raise ValueError("max_sequences must be between 1 and max_batch_tokens")
        if self.prompt_chunk < 1 or self.patience < 0:
            raise ValueError("max_prompt_chunk must be at least 1 and patience at least 0")
        if self.target_gap <= 0 or self.max_drafts < 1:
            raise ValueError("target_gap must be positive and max_drafts at least 1")

    @property
    def max_under_served(self) -> int:
        """Limit of waiting requests that a full engine takes from under-served tenants: half of the
        batch slots, the share of a second tenant.
        """
        return self.max_sequences // 2

    @property
    def prompt_chunk(self) -> int:
        """Limit of one sequence's tokens in a step."""
        return self.max_batch_tokens if self.max_prompt_chunk is None else self.max_prompt_chunk


@dataclass(slots=True, kw_only=True)
class Plan:
    """What the next step computes: `tokens[sequence]` of its pending tokens, in this order.

    Drafts of a sequence are the last of its tokens, after all pending ones. A plan describes the
    sequences at the time it was made; they may have advanced when the step has been computed.
    """

    tokens: dict[Sequence, int] = field(default_factory=dict)
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    read_for: list[Sequence] = field(default_factory=list)  # why the step before was read first
    sampling: list[Sequence] = field(default_factory=list)  # those that get tokens, in order
    skipped: set[Sequence] = field(default_factory=set)  # of these, those that get none after all
    opened: dict[Sequence, Guide] = field(default_factory=dict)  # and those whose rows are open
    scored: dict[Sequence, range] = field(default_factory=dict)  # prompt positions to score
    prompt_tokens: int = 0  # prompt tokens in this step
    recomputed_tokens: int = 0  # computed before, then lost by a preemption
    work: StepWork = field(default_factory=StepWork)
    sources: dict[Sequence, Source] = field(default_factory=dict)  # those that it encodes
    source_tokens: int = 0  # of these; part of `work`, not of `num_tokens`
    expired: list[Sequence] = field(default_factory=list)  # past their deadline, already removed
    preempted: list[Sequence] = field(default_factory=list)  # by this step; may repeat a sequence
    prefix_hit_tokens: int = 0  # prompt tokens of admitted sequences found in the cache

    def add(self, sequence: Sequence, num: int) -> None:
        """Adds `num` tokens of a sequence to the step."""
        if sequence.source is not None and not sequence.source.encoded:
            size = len(sequence.source.tokens)
            self.sources[sequence] = sequence.source
            self.source_tokens += size
            self.work = self.work.plus(size, computed=0, sampled=0)
        computed, sampled = sequence.num_computed, sequence.samples(num)
        self.tokens[sequence] = num
        self.work = self.work.plus(num, computed=computed, sampled=sampled)
        self.prompt_tokens += min(num, max(0, sequence.num_prompt - computed))
        self.recomputed_tokens += min(num, max(0, sequence.high_water - computed))
        if sampled:
            self.sampling.append(sequence)
        if scored := sequence.scored(num):
            self.scored[sequence] = scored

    def add_decodes(self, sequences: Iterable[Sequence]) -> None:
        """Adds the one pending token of each: the same as `add`, with less Python per sequence."""
        num = contexts = 0
        for sequence in sequences:
            if sequence.num_output == 0 or sequence.high_water > sequence.num_computed:
                self.add(sequence, 1)
                continue
            self.tokens[sequence] = 1
            self.sampling.append(sequence)
            num += 1
            contexts += sequence.num_computed + 1
        tokens, products, attended, sampled = self.work
        self.work = StepWork(tokens + num, products + contexts, attended + contexts, sampled + num)

    def draft(self, sequence: Sequence, drafts: list[int]) -> None:
        """Adds drafts after the last token of a sequence that is in the step."""
        self.tokens[sequence] += len(drafts)
        self.drafts[sequence] = drafts
        self.work = self.work.drafted(len(drafts), context=sequence.num_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens of texts: sources, which the encoder reads, have a budget of their own."""
        return self.work.tokens - self.source_tokens

    @property
    def num_drafts(self) -> int:
        return sum(map(len, self.drafts.values()))


class StepBudget:
    """The rest of a step. Made when the plan has its decodes and nothing else."""

    def __init__(self, plan: Plan, *, config: EngineConfig, cost: CostModel) -> None:
        self._plan = plan
        self._config = config
        self._cost = cost
        self._num_decodes = plan.num_tokens
        self._seconds = self._time_limit()

    @property
    def num_tokens(self) -> int:
        """Tokens that still fit."""
        return self._config.max_batch_tokens - self._plan.num_tokens

    def shared_by(self, prompts: list[Sequence]) -> int:
        """Tokens that these running prompts share, before any of them is in the plan."""
        if self._num_decodes and len({sequence.tenant for sequence in prompts}) > 1:
            return self._in_time(prompts[0], self.num_tokens)
        return self.num_tokens

    def chunk(self, sequence: Sequence, *, most: int | None = None) -> int:
        """Pending tokens of a prompt to compute in this step, at most `most`; 0 if its source is
        to be encoded first, and that does not fit.
        """
        if not self._has_room_for_source(sequence):
            return 0
        # Without a mask the next token cannot be sampled, so the last pending one stays pending.
        pending = sequence.num_pending - (0 if sequence.may_sample else 1)
        num = min(pending, self._config.prompt_chunk, self.num_tokens)
        num = num if most is None else min(num, most)
        return self._in_time(sequence, num) if self._num_decodes else num

    def _has_room_for_source(self, sequence: Sequence) -> bool:
        """A source is encoded whole. A step has room for one, and for more up to the limit of its
        tokens and, if others decode, of its time.
        """
        if sequence.source is None or sequence.source.encoded or not self._plan.sources:
            return True
        size = len(sequence.source.tokens)
        if self._plan.source_tokens + size > self._config.max_batch_tokens:
            return False
        if not self._num_decodes:
            return True
        fitting = self._cost.chunk(self._plan.work, computed=0, most=size, limit=self._seconds)
        return fitting is not None and fitting >= size

    def _time_limit(self) -> float:
        """Predicted seconds that the step may take: the target gap or twice the time of its
        decodes, whichever is longer, divided by the reserve for longer steps than predicted.

        If the decodes alone come near the target, prompts would otherwise progress slowly, and so
        would the throughput gained by more sequences. So the reserve takes at most half of their
        time.
        """
        alone = (self._cost.seconds(self._plan.work) if self._num_decodes else None) or 0.0
        target = max(self._config.target_gap, 2 * alone)
        return max(target / self._cost.reserve, (target + alone) / 2)

    def _in_time(self, sequence: Sequence, most: int) -> int:
        """How many of `most` tokens of a prompt keep the step within its time limit."""
        prompt_tokens = self._plan.num_tokens - self._num_decodes
        num = self._cost.chunk(
            self._plan.work, computed=sequence.num_computed, most=most, limit=self._seconds
        )
        if num is None:
            return min(most, max(0, UNMEASURED_CHUNK - prompt_tokens))
        return num if prompt_tokens else max(num, min(most, LEAST_CHUNK))
