"""StepBudget: how many prompt tokens still fit into the step that is being planned.

A step has a limit of tokens. While some sequence decodes it also has a limit of time, so that
prompts come in chunks that delay the decodes little; see `cost` for the durations.
"""

from __future__ import annotations

from service.engine.cost import CostModel
from service.engine.plan import EngineConfig, Plan
from service.engine.sequence import Sequence

UNMEASURED_CHUNK = 128  # prompt tokens in a step with decodes, before durations are known
LEAST_CHUNK = 16  # a prompt makes progress even if the decodes alone exceed the target gap


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
        """Pending tokens of a prompt to compute in this step, at most `most`."""
        # Without a mask the next token cannot be sampled, so the last pending one stays pending.
        pending = sequence.num_pending - (0 if sequence.may_sample else 1)
        num = min(pending, self._config.prompt_chunk, self.num_tokens)
        num = num if most is None else min(num, most)
        return self._in_time(sequence, num) if self._num_decodes else num

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
