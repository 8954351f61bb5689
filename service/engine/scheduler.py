"""Scheduler: which sequences compute how many tokens in the next step, and who holds which block.

It decides in ints. It knows no tensors (`pack`), no text and no reason to stop but the deadline
(`answer`): whoever drives it says when a sequence is finished.

    schedule(now)           expire -> reserve -> decodes -> running prompts -> admissions -> Plan
    update(plan, sampled)   counts what was computed, lets full blocks be found, appends the tokens

Memory. At admission a sequence takes the blocks of all its tokens and of a first block of output.
When a running one needs a block and none is free, the youngest of the lowest priority is preempted:
it gives its blocks back, keeps its tokens and computes them again later. Once preempted, a sequence
counts as of the highest class in this choice, so that only those who came before it can displace
it again; the first in this order is never displaced, hence there is always one that goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from service.engine.blocks import BlockAllocator, chain_digest, chain_root
from service.engine.order import WaitingOrder
from service.engine.plan import EngineConfig, Plan
from service.engine.sequence import Sequence, SequenceStatus
from service.errors import BadRequest
from service.messages import GenerationRequest


class Scheduler:
    """All sequences of an engine. Used from one thread."""

    def __init__(
        self,
        config: EngineConfig,
        allocator: BlockAllocator,
        *,
        max_model_len: int,
        numeric_class: str = "",
    ) -> None:
        self.max_model_len = min(max_model_len, config.max_model_len or max_model_len)
        self.running: list[Sequence] = []  # in order of admission
        self._config = config
        self._allocator = allocator
        self._numeric_class = numeric_class
        self._sequences: dict[str, Sequence] = {}
        self._order = WaitingOrder(patience=config.patience)
        self._seats = list(range(config.max_sequences - 1, -1, -1))  # a stack: seat 0 first
        self._arrivals = itertools.count()

    @property
    def num_waiting(self) -> int:
        """Sequences without a seat."""
        return len(self._sequences) - len(self.running)

    @property
    def num_sequences(self) -> int:
        """All that are not finished."""
        return len(self._sequences)

    def add(
        self,
        request: GenerationRequest,
        *,
        tokens: tuple[int, ...] = (),
        deadline: float | None = None,
    ) -> Sequence:
        """Lets a request wait; `tokens` of its answer are already known.

        Raises BadRequest for a request that this engine can never serve, ValueError for an id that
        is already here.
        """
        if request.id in self._sequences:
            raise ValueError("a request of this id is already in the engine")
        self._check_fits(request)
        sequence = Sequence(
            request=request,
            tokens=[*request.prompt_ids, *tokens],
            arrival=next(self._arrivals),
            deadline=deadline,
        )
        self._sequences[request.id] = sequence
        self._order.enter(sequence)
        return sequence

    def abort(self, request_id: str) -> Sequence | None:
        """Removes a sequence; its blocks are free at once. None where the id is not known."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.finish(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Removes a sequence that is here; its blocks are free at once."""
        del self._sequences[sequence.id]
        if sequence.status is SequenceStatus.RUNNING:
            self._unseat(sequence)
        self._order.leave(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self, now: float) -> Plan:
        """Plans a step. It is never empty while there are sequences."""
        plan = Plan(expired=self._expire(now))
        self._reserve(plan)
        for sequence in self.running:
            if sequence.num_pending == 1:
                plan.add(sequence, 1)
        for sequence in self.running:
            if sequence.num_pending > 1:
                self._plan_chunk(plan, sequence)
        self._admit(plan)
        return plan

    def update(self, plan: Plan, sampled: Iterable[int]) -> list[Sequence]:
        """Notes that the plan was computed; `sampled` is one token for each of `plan.sampling`.

        Returns the sequences that grew by one token.
        """
        tokens = iter(sampled)
        grown: list[Sequence] = []
        for sequence, num in plan.tokens.items():
            samples = sequence.samples(num)
            sequence.num_computed += num
            sequence.high_water = max(sequence.high_water, sequence.num_computed)
            self._publish(sequence)
            if samples:
                sequence.tokens.append(next(tokens))
                self._order.charge(sequence.tenant, 1)
                grown.append(sequence)
        return grown

    def check_integrity(self) -> None:
        """Raises RuntimeError where bookkeeping contradicts itself. For tests and idle moments."""
        self._allocator.check_integrity(sequence.blocks for sequence in self._sequences.values())
        seats = [*self._seats, *(s.seat for s in self.running if s.seat is not None)]
        if sorted(seats) != list(range(self._config.max_sequences)):
            raise RuntimeError("a seat is lost or taken twice")
        if len(self._order) != self.num_waiting:
            raise RuntimeError("a sequence neither waits nor runs")
        for sequence in self._sequences.values():
            if self._allocator.blocks_for(sequence.num_computed) > len(sequence.blocks):
                raise RuntimeError("a computed token has no block")

    def _check_fits(self, request: GenerationRequest) -> None:
        if not request.prompt_ids:
            raise BadRequest("the prompt must have at least 1 token", code="empty_prompt")
        if request.max_tokens < 1:
            raise BadRequest("max_tokens must be at least 1", code="integer_below_min_value")
        slots = self._allocator.num_blocks * self._allocator.block_size
        if request.max_total_tokens > self.max_model_len or _slots(request) > slots:
            raise BadRequest(
                f"prompt and max_tokens exceed {min(self.max_model_len, slots + 1)} tokens",
                code="context_length_exceeded",
            )

    def _expire(self, now: float) -> list[Sequence]:
        expired = [
            sequence
            for sequence in self._sequences.values()
            if sequence.deadline is not None and sequence.deadline <= now
        ]
        for sequence in expired:
            self.finish(sequence)
        return expired

    def _reserve(self, plan: Plan) -> None:
        """Gives each running sequence the blocks of its tokens, preempting where none is left."""
        blocks_for = self._allocator.blocks_for
        short = [s for s in self.running if blocks_for(s.num_tokens) > len(s.blocks)]
        for sequence in sorted(short, key=_rank):
            while sequence.status is SequenceStatus.RUNNING:
                num_new = blocks_for(sequence.num_tokens) - len(sequence.blocks)
                fresh = self._allocator.take(num_new)
                if fresh is not None:
                    sequence.blocks += fresh
                    break
                self._preempt(max(self.running, key=_rank))
                plan.preemptions += 1

    def _plan_chunk(self, plan: Plan, sequence: Sequence) -> None:
        left = self._config.max_batch_tokens - plan.num_tokens
        num = min(sequence.num_pending, self._config.max_prompt_chunk, left)
        if num:
            plan.add(sequence, num)

    def _admit(self, plan: Plan) -> None:
        """Seats those who are next until one does not fit: it is waited for, not overtaken."""
        while self._seats and plan.num_tokens < self._config.max_batch_tokens:
            sequence = self._order.peek()
            if sequence is None or not self._take_blocks(sequence):
                return
            self._order.admitted(sequence)
            sequence.status = SequenceStatus.RUNNING
            sequence.seat = self._seats.pop()
            self.running.append(sequence)
            hit = min(sequence.num_computed, sequence.num_prompt)
            plan.prefix_hit_tokens += hit
            if not sequence.preemptions:
                sequence.num_cached = hit
                self._order.charge(sequence.tenant, sequence.num_pending)
            self._plan_chunk(plan, sequence)

    def _take_blocks(self, sequence: Sequence) -> bool:
        """The table of a sequence to admit, as far as possible from the prefix cache.

        A hit never covers the last token: its logits are needed, and the cache has none.
        """
        size = self._allocator.block_size
        num_findable = 0 if sequence.scores_prompt else (sequence.num_tokens - 1) // size
        shared = self._allocator.find(self._digests(sequence, num_findable))
        slots = min(sequence.num_tokens + size, _slots(sequence.request))
        num_new = self._allocator.blocks_for(slots) - len(shared)
        table = self._allocator.take(num_new, shared=shared)
        if table is None:
            return False
        sequence.blocks = table
        sequence.num_published = len(shared)
        sequence.num_computed = len(shared) * size
        return True

    def _digests(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Digests of its first full blocks, hashed once and kept."""
        if not self._config.prefix_cache:
            return []
        size, digests = self._allocator.block_size, sequence.digests
        for index in range(len(digests), num_blocks):
            parent = digests[-1] if digests else chain_root(sequence.tenant, self._numeric_class)
            digests.append(chain_digest(parent, sequence.tokens[index * size : (index + 1) * size]))
        return digests[:num_blocks]

    def _publish(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed // self._allocator.block_size
        if num_full == sequence.num_published:
            return
        digests = self._digests(sequence, num_full)
        for index in range(sequence.num_published, len(digests)):
            self._allocator.publish(sequence.blocks[index], digests[index])
        sequence.num_published = num_full

    def _preempt(self, sequence: Sequence) -> None:
        self._unseat(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed = 0
        sequence.preemptions += 1
        self._order.put_back(sequence)

    def _unseat(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.seat is not None:
            self._seats.append(sequence.seat)
        sequence.seat = None
        self._allocator.release(sequence.blocks)
        sequence.blocks = []


def _rank(sequence: Sequence) -> tuple[int, int]:
    """The greatest is preempted first. It does not change while a sequence runs."""
    return (0 if sequence.preemptions else sequence.request.priority, sequence.arrival)


def _slots(request: GenerationRequest) -> int:
    """Slots that a request can come to need: the last token's KV is never stored."""
    return request.max_total_tokens - 1
