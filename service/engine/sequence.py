"""Sequence: a request inside the engine, as the scheduler sees it.

It holds token ids, counters and a reference to the guide of its grammar. Text and stop strings are
in `output`, free blocks in `blocks`, tensors in `pack`.

    tokens            | prompt ....................... | output ............ |
    position          0                         num_prompt            num_tokens
    KV                | stored ........... | to compute (pending) ....... |
                      0               num_computed                  num_tokens

There is no prefill phase and no decode phase. A step computes some of the pending tokens; one that
computes all of them yields the next token, and then one token is pending again. After the last one
a step may compute drafts (see `speculate`): they are part of the plan, and of the sequence once
they are accepted.

A step in flight counts as computed, and its next token as one of the sequence although it is not
read yet (`num_unread`): so the following step can be planned meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from service.engine.guide import Guide
from service.messages import GenerationRequest


class SequenceStatus(StrEnum):
    """State of a sequence.

    WAITING --admitted--> RUNNING --finished or aborted--> FINISHED
       ^                     |                                ^
       +-----preempted-------+         WAITING ---aborted-----+
    """

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True)
class Source:
    """What the encoder reads. The keys and values that the decoder makes of it lie in blocks that
    the sequence holds beside its own.
    """

    tokens: tuple[int, ...]
    blocks: list[int] = field(default_factory=list)
    encoded: bool = False  # by a step that was launched, or found in the prefix cache


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request. Only the scheduler modifies it.

    `tokens` starts as the prompt and the output tokens of earlier engines. Sequences are compared
    by identity.
    """

    request: GenerationRequest
    tokens: list[int]
    arrival: int  # rises with each sequence added
    deadline: float | None = None  # on the engine's monotonic clock, seconds
    guide: Guide | None = None  # of its grammar; `OutputBuilder` advances it
    source: Source | None = None  # of an encoder-decoder
    status: SequenceStatus = SequenceStatus.WAITING
    batch_slot: int | None = None  # while it runs
    blocks: list[int] = field(default_factory=list)  # its block table
    dropped: range = range(0)  # columns of the table whose blocks were released (see `tables`)
    anchors: list[int] = field(default_factory=list)  # positions, if the cache keeps them alone
    num_scanned: int = 0  # tokens searched for anchors
    anchor_blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # one per full block hashed so far
    num_unread: int = 0  # tokens after `tokens` that steps in flight will yield
    num_computed: int = 0  # tokens whose KV is stored, or will be by steps in flight
    num_published: int = 0  # leading blocks that others can find by their digests
    num_cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    high_water: int = 0  # the maximum of num_computed so far
    preemptions: int = 0
    # Copies of the request's: each step reads some of them for every sequence.
    id: str = field(init=False)
    tenant: str = field(init=False)
    num_prompt: int = field(init=False)  # tokens, without a source's
    needs_tokens: bool = field(init=False)  # see `chooses_by_tokens`
    max_total_tokens: int = field(init=False)  # prompt and output, without a source

    def __post_init__(self) -> None:
        self.id, self.tenant = self.request.id, self.request.tenant
        self.num_prompt = len(self.request.prompt_ids) - self.request.source
        self.max_total_tokens = self.request.max_total_tokens - self.request.source
        params = self.request.sampling
        self.needs_tokens = params.penalises or bool(params.allowed)

    @property
    def lacks_source(self) -> bool:
        """Whether its source is still to be encoded, before any of its tokens is computed."""
        return self.source is not None and not self.source.encoded

    @property
    def source_blocks(self) -> list[int]:
        """The blocks of its source, if it has one."""
        return [] if self.source is None else self.source.blocks

    @property
    def held_blocks(self) -> list[int]:
        """The blocks that it holds: of its table, of its anchors and of its source."""
        dropped = self.dropped
        others = self.anchor_blocks + self.source_blocks
        if not (dropped or others):
            return self.blocks
        return self.blocks[: dropped.start] + self.blocks[dropped.stop :] + others

    @property
    def num_held(self) -> int:
        """How many they are."""
        own = len(self.blocks) - len(self.dropped)
        return own + len(self.anchor_blocks) + len(self.source_blocks)

    @property
    def is_alive(self) -> bool:
        """Whether it can still get tokens."""
        return self.status is not SequenceStatus.FINISHED

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, read or not."""
        return len(self.tokens) + self.num_unread

    @property
    def num_output(self) -> int:
        return len(self.tokens) + self.num_unread - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is not stored yet; at least one while the sequence lives."""
        return len(self.tokens) + self.num_unread - self.num_computed

    @property
    def num_remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.max_total_tokens - len(self.tokens) - self.num_unread

    @property
    def may_sample(self) -> bool:
        """Whether a step can yield its next token: the mask of its grammar is computed."""
        return self.guide is None or self.guide.ready

    @property
    def chooses_by_tokens(self) -> bool:
        """Whether its next token can be sampled only after the previous one has been read, because
        of penalties or a grammar. Runners take no mask for a row whose token is unread, not even
        one that never changes.
        """
        if self.guide is not None and self.guide.binds(self.num_unread + 1):
            return True
        return self.needs_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of the prompt's tokens are still to be computed.

        They are delivered with the first output token. Until then every token of the prompt is
        computed and none taken from the prefix cache, which keeps KV but no logits.
        """
        return self.request.prompt_logprobs is not None and self.num_output == 0

    def scan(self, anchor_ids: frozenset[int]) -> list[int]:
        """The positions of all anchors among its tokens; looks at new tokens only."""
        fresh = self.tokens[self.num_scanned :]
        self.anchors += [
            position
            for position, token in enumerate(fresh, start=self.num_scanned)
            if token in anchor_ids
        ]
        self.num_scanned = len(self.tokens)
        return self.anchors

    def samples(self, num: int) -> int:
        """Rows that sample a token in a step of `num` tokens: its last pending one and drafts."""
        return max(0, self.num_computed + num + 1 - self.num_tokens)

    def scored(self, num: int) -> range:
        """Positions of the prompt's tokens that a step of `num` tokens scores.

        The logits at a position score the token after it; the first token has no score.
        """
        if not self.scores_prompt:
            return range(0)
        return range(self.num_computed + 1, min(self.num_computed + num + 1, self.num_prompt))
