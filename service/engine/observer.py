"""Observer: receives a report of each engine step. Independent of any metrics library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One engine step. Times in seconds, counts at its end."""

    duration: float  # since the previous step, or since there was work
    run_duration: float  # inside the runner
    num_tokens: int  # 0: nothing was computed, but gauges may have changed
    num_sequences: int
    num_encoded: int = 0  # inputs encoded
    num_sampled: int = 0  # output tokens added
    num_drafts: int = 0  # see `speculate`
    num_accepted: int = 0  # accepted drafts
    running: int
    waiting: int = 0
    blocks_used: int = 0  # referenced by a sequence
    blocks_cached: int = 0  # free, with content for the prefix cache
    blocks_free: int = 0
    preempted: tuple[str, ...] = ()  # by this step: request ids; may repeat one
    recomputed_tokens: int = 0  # computed again in this step, after a preemption
    num_skipped: int = 0  # rows in vain: a mask was late, or the host chose another token
    prefix_hit_tokens: int = 0  # prompt tokens of sequences admitted in this step
    prompt_tokens: int  # prompt tokens computed in this step

    @property
    def preemptions(self) -> int:
        return len(self.preempted)


class Observer:
    """Called from the engine thread; must not block and must not raise.

    It ignores all events; subclasses override the methods that they need.
    """

    def stepped(self, report: StepReport) -> None:
        """A step was computed, or only changed what runs or waits."""
