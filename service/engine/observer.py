"""Observer: what the engine tells whoever counts. It knows no metrics library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One engine step. Times in seconds, counts at its end."""

    duration: float  # since the step before it, or since there was something to do
    run_duration: float  # inside the runner
    num_tokens: int  # 0: nothing was computed, but what runs, waits or is held may have changed
    num_sequences: int
    num_sampled: int  # tokens that the answers grew by
    num_drafts: int  # tokens guessed and computed in advance; see `speculate`
    num_accepted: int  # of these, those that came true
    running: int
    waiting: int
    blocks_used: int  # referenced by a sequence
    blocks_cached: int  # free, with content that a prefix hit may find
    blocks_free: int
    preempted: tuple[str, ...]  # by this step: ids of requests; one may come twice
    recomputed_tokens: int  # computed a second time in this step, after a preemption
    prefix_hit_tokens: int  # prompt tokens found cached in this step's admissions
    prompt_tokens: int  # prompt tokens computed in this step

    @property
    def preemptions(self) -> int:
        """How many there were."""
        return len(self.preempted)


class Observer(Protocol):
    """Called from the engine thread; must not block and must not raise."""

    def stepped(self, report: StepReport) -> None:
        """A step is done."""
        ...


class NullObserver:
    """Counts nothing."""

    def stepped(self, report: StepReport) -> None:
        """Drops the report."""
