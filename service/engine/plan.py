"""Plan: what the scheduler decided for one step. EngineConfig: the limits it decides within."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How large a step may be. Raises ValueError for limits that contradict one another."""

    max_batch_tokens: int = 512  # the budget of a step
    max_sequences: int = 64  # seats
    max_prompt_chunk: int = 256  # most tokens of one sequence in a step
    max_model_len: int | None = None  # tokens of prompt and answer; None: what the model can
    patience: int = 8  # see `order`
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequences <= self.max_batch_tokens:
            raise ValueError("max_sequences must be between 1 and max_batch_tokens")
        if self.max_prompt_chunk < 1 or self.patience < 0:
            raise ValueError("max_prompt_chunk must be at least 1 and patience at least 0")


@dataclass(slots=True, kw_only=True)
class Plan:
    """What the next step computes: `tokens[sequence]` of its pending ones, in this order."""

    tokens: dict[Sequence, int] = field(default_factory=dict)
    num_tokens: int = 0
    expired: list[Sequence] = field(default_factory=list)  # past their deadline, already removed
    preemptions: int = 0
    prefix_hit_tokens: int = 0  # prompt tokens found cached by those admitted

    def add(self, sequence: Sequence, num: int) -> None:
        """Gives a sequence `num` tokens of the step."""
        self.tokens[sequence] = num
        self.num_tokens += num

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences that get a token, in the order of the batch. Before `update` only."""
        return [sequence for sequence, num in self.tokens.items() if sequence.samples(num)]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts in this step. Before `update` only."""
        return sum(
            min(num, max(0, sequence.num_prompt - sequence.num_computed))
            for sequence, num in self.tokens.items()
        )

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that were computed before, then lost by a preemption. Before `update` only."""
        return sum(
            min(num, max(0, sequence.high_water - sequence.num_computed))
            for sequence, num in self.tokens.items()
        )
