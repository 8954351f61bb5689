"""Sequence: a request inside the engine, as the scheduler sees it.

It holds token ids and counters only, and lends out the guide of its grammar. What a token means
(text, stop strings) is `answer`'s concern, which blocks are free is `blocks`', and no tensor comes
near it.

    tokens            | prompt ....................... | answer ............ |
    position          0                         num_prompt            num_tokens
    KV                | stored ........... | to compute (pending) ....... |
                      0               num_computed                  num_tokens

There is no prefill phase and no decode phase. A step computes some of what is pending; one that
computes all of it yields the next token, and then one token is pending again. Behind the last one a
step may compute drafts (see `speculate`): they stand in the plan, and here once they came true.

Once a step is under way it counts as computed, and the token it will yield as one of the sequence,
though nobody has read it yet (`num_unread`): so the step after it can be planned meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from service.engine.guide import Guide
from service.messages import GenerationRequest


class SequenceStatus(StrEnum):
    """Where a sequence is.

    WAITING --admitted--> RUNNING --finished or aborted--> FINISHED
       ^                     |                                ^
       +-----preempted-------+         WAITING ---aborted-----+
    """

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request being answered. Only the scheduler changes it.

    `tokens` starts as the prompt and what earlier engines had already answered. Two sequences are
    equal only if they are the same object.
    """

    request: GenerationRequest
    tokens: list[int]
    arrival: int  # rises with each sequence added: who came first
    deadline: float | None = None  # on the engine's monotonic clock, seconds
    guide: Guide | None = None  # of its grammar; the answer reads it on
    status: SequenceStatus = SequenceStatus.WAITING
    seat: int | None = None  # while it runs
    blocks: list[int] = field(default_factory=list)  # its block table
    digests: list[bytes] = field(default_factory=list)  # one per full block hashed so far
    num_unread: int = 0  # tokens behind `tokens` that steps under way will yield
    num_computed: int = 0  # tokens whose KV is stored, or will be by steps under way
    num_published: int = 0  # leading blocks that others may find by their digests
    num_cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    high_water: int = 0  # the most tokens that were ever computed
    preemptions: int = 0
    # Of the request. Every step asks each sequence for some of them.
    id: str = field(init=False)
    tenant: str = field(init=False)
    num_prompt: int = field(init=False)  # tokens of the prompt
    max_total_tokens: int = field(init=False)  # of prompt and answer

    def __post_init__(self) -> None:
        self.id, self.tenant = self.request.id, self.request.tenant
        self.num_prompt = len(self.request.prompt_ids)
        self.max_total_tokens = self.request.max_total_tokens

    @property
    def is_alive(self) -> bool:
        """Whether it may still get tokens."""
        return self.status is not SequenceStatus.FINISHED

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer, read or not."""
        return len(self.tokens) + self.num_unread

    @property
    def num_output(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) + self.num_unread - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is not stored yet; at least one while the sequence lives."""
        return len(self.tokens) + self.num_unread - self.num_computed

    @property
    def num_remaining(self) -> int:
        """Tokens that the answer may still grow by."""
        return self.max_total_tokens - len(self.tokens) - self.num_unread

    @property
    def may_sample(self) -> bool:
        """Whether a step may yield its next token: the mask of its grammar is computed."""
        return self.guide is None or self.guide.ready

    @property
    def chooses_by_tokens(self) -> bool:
        """Whether its next token can be chosen only where the one before it has been read:
        penalties count it, a grammar goes on from it.
        """
        params = self.request.sampling
        return self.guide is not None or params.penalises

    @property
    def scores_prompt(self) -> bool:
        """Whether the log probabilities of the prompt's tokens are still to be told.

        They go out with the answer's first token. Until then every token of the prompt is computed
        and none taken from the prefix cache, which keeps KV but no logits.
        """
        return self.request.prompt_logprobs is not None and self.num_output == 0

    def samples(self, num: int) -> int:
        """Rows of a step of `num` tokens that choose a token: the last of its own, its drafts'."""
        return max(0, self.num_computed + num + 1 - self.num_tokens)

    def scored(self, num: int) -> range:
        """Positions of the prompt's tokens that a step of `num` tokens scores.

        The logits at a position score the token after it; the first token has no score.
        """
        if not self.scores_prompt:
            return range(0)
        return range(self.num_computed + 1, min(self.num_computed + num + 1, self.num_prompt))
