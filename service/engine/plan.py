"""Plan: what the scheduler decided for one step. EngineConfig: the limits it decides within."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from service.engine.cost import StepWork
from service.engine.sequence import Sequence


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
    sampling: list[Sequence] = field(default_factory=list)  # those that get tokens, in order
    scored: dict[Sequence, range] = field(default_factory=dict)  # prompt positions to score
    prompt_tokens: int = 0  # prompt tokens in this step
    recomputed_tokens: int = 0  # computed before, then lost by a preemption
    work: StepWork = field(default_factory=StepWork)
    expired: list[Sequence] = field(default_factory=list)  # past their deadline, already removed
    preempted: list[Sequence] = field(default_factory=list)  # by this step; may repeat a sequence
    prefix_hit_tokens: int = 0  # prompt tokens of admitted sequences found in the cache

    def add(self, sequence: Sequence, num: int) -> None:
        """Adds `num` tokens of a sequence to the step."""
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
        return self.work.tokens

    @property
    def num_drafts(self) -> int:
        return sum(map(len, self.drafts.values()))
