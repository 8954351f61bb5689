"""Scheduler: which sequences compute how many tokens in the next step, and who holds which block.

It decides in ints. It knows no tensors (`pack`), no text and no reason to stop but the deadline
(`answer`): whoever drives it says when a sequence is finished.

    schedule(now)        expire, reserve, make way, decodes, prompts, admissions, drafts -> Plan
    launched(plan)       counts what the step computes; the next one can be planned from here on
    update(plan, runs)   appends the tokens, lets full blocks be found

A runner computes steps in the order they are launched. So a block may be found, freed or taken by
another while a step that writes it is under way: whoever uses it next does so in a later step.

Memory. At admission a sequence takes the blocks of all its tokens and of a first block of output.
When a running one needs a block and none is free, the youngest of the lowest priority (among those
of tenants over their share, where there are such: see `shares`) is preempted:
it gives its blocks back, keeps its tokens and computes them again later. Once preempted, a sequence
counts as of the highest class in this choice, so that only those who came before it can displace
it again; the first in this order is never displaced, hence there is always one that goes on. So it
is where sequences are preempted to make way for another tenant's.

Time. While some decode, prompts come in chunks that keep the step within the target gap, by the
cost model. A step of decodes only may carry drafts: in slots that the sequence has anyway, or in
blocks of which every running sequence could have one more. They displace nobody, and a block taken
for drafts stays with the sequence, which fills it next. The KV of a draft that did not come true is
overwritten: it was never counted as computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Run

from service.engine.blocks import BlockAllocator, chain_digest, chain_root
from service.engine.cost import CostModel
from service.engine.guide import Guide
from service.engine.order import WaitingOrder
from service.engine.plan import EngineConfig, Plan
from service.engine.sequence import Sequence, SequenceStatus
from service.engine.shares import Shares, rank, split_evenly
from service.engine.speculate import Speculator
from service.errors import BadRequest
from service.messages import GenerationRequest

UNMEASURED_CHUNK = 128  # tokens of prompts beside decodes, before a step's cost is known
LEAST_CHUNK = 16  # a prompt goes on, even where the decodes alone exceed the gap


class Scheduler:
    """All sequences of an engine. Used from one thread. Without a speculator: no drafts."""

    def __init__(
        self,
        config: EngineConfig,
        allocator: BlockAllocator,
        *,
        max_model_len: int,
        cost: CostModel,
        speculator: Speculator | None = None,
        numeric_class: str = "",
    ) -> None:
        self.max_model_len = min(max_model_len, config.max_model_len or max_model_len)
        self.running: list[Sequence] = []  # in order of admission
        self._config = config
        self._allocator = allocator
        self._cost = cost
        self._speculator = speculator
        self._numeric_class = numeric_class
        self._sequences: dict[str, Sequence] = {}
        self._order = WaitingOrder(patience=config.patience)
        self._seats = list(range(config.max_sequences - 1, -1, -1))  # a stack: seat 0 first
        self._arrivals = itertools.count()
        self._gap = config.target_gap  # seconds that the step in planning is to take

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
        guide: Guide | None = None,
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
            guide=guide,
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
        if self._speculator is not None:
            self._speculator.forget(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self, now: float) -> Plan:
        """Plans a step. It is empty only if each sequence has a token unread or lacks a mask."""
        plan = Plan(expired=self._expire(now))
        self._reserve(plan)
        self._make_way(plan)
        decodes = [s for s in self.running if s.num_pending == 1 and s.num_remaining]
        plan.add_decodes([sequence for sequence in decodes if sequence.may_sample])
        num_decodes = plan.num_tokens
        self._gap = self._allowed_gap(plan)
        self._plan_prompts(plan, num_decodes)
        self._admit(plan, num_decodes)
        if self._speculator is not None and 0 < plan.work.sampled == plan.num_tokens:
            self._add_drafts(plan, self._speculator)
        return plan

    def launched(self, plan: Plan) -> None:
        """Notes that the plan is under way. Nothing is known of its drafts yet."""
        drafts = plan.drafts
        for sequence, num in plan.tokens.items():
            _advance(sequence, num - len(drafts[sequence]) if sequence in drafts else num)
        for sequence in plan.sampling:
            sequence.num_unread += 1

    def update(self, plan: Plan, runs: Iterable[Run[int]]) -> None:
        """Notes that the plan was computed; `runs` has the new tokens of each of `plan.sampling`.

        They are one, or as many drafts as came true and one; fewer only where the answer ends.
        Sequences that were removed meanwhile get nothing.
        """
        for sequence, new in zip(plan.sampling, runs, strict=True):
            sequence.num_unread -= 1
            if not sequence.is_alive:
                continue
            sequence.tokens.extend(new)
            if sequence in plan.drafts:
                _advance(sequence, len(new) - 1)
                self._learn(sequence, len(plan.drafts[sequence]), len(new) - 1)
            self._order.charge(sequence.tenant, len(new))
        size = self._allocator.block_size
        for sequence in plan.tokens:
            num_full = sequence.num_computed // size
            if num_full != sequence.num_published and sequence.status is SequenceStatus.RUNNING:
                self._publish(sequence, num_full)

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
        blocks_for, size = self._allocator.blocks_for, self._allocator.block_size
        short = [s for s in self.running if s.num_tokens > size * len(s.blocks) and s.num_remaining]
        for sequence in sorted(short, key=rank):
            while sequence.status is SequenceStatus.RUNNING:
                num_new = blocks_for(sequence.num_tokens) - len(sequence.blocks)
                fresh = self._allocator.take(num_new)
                if fresh is not None:
                    sequence.blocks += fresh
                    break
                self._preempt(plan, self._shares().victim() or max(self.running, key=rank))

    def _shares(self) -> Shares:
        return Shares(
            self.running,
            num_tenants=self._order.num_tenants,
            num_seats=self._config.max_sequences,
            num_blocks=self._allocator.num_blocks,
        )

    def _make_way(self, plan: Plan) -> None:
        """Seats who waits, while below its tenant's share, if need be in the places of others."""
        going_on = self._order.num_tenants > 1
        while going_on:
            shares, going_on = self._shares(), False
            for sequence in self._order.heads():
                num_blocks = self._allocator.blocks_for(self._slots_to_begin(sequence))
                if not sequence.num_unread and shares.covers(sequence, num_blocks=num_blocks):
                    going_on |= self._seat_before_others(plan, sequence)
                    shares = self._shares()

    def _seat_before_others(self, plan: Plan, sequence: Sequence) -> bool:
        while not (self._seats and self._take_blocks(sequence)):
            victim = self._shares().victim(priority=sequence.request.priority)
            if victim is None:
                return False
            self._preempt(plan, victim)
        self._seat(plan, sequence)
        return True

    def _plan_prompts(self, plan: Plan, num_decodes: int) -> None:
        prompts = [sequence for sequence in self.running if sequence.num_pending > 1]
        left = self._config.max_batch_tokens - plan.num_tokens
        if num_decodes and len({sequence.tenant for sequence in prompts}) > 1:
            left = self._within_gap(plan, prompts[0], left, 0)  # what there is to share
        for sequence, most in split_evenly(prompts, num_tokens=left):
            self._plan_chunk(plan, sequence, num_decodes, most=most)

    def _plan_chunk(
        self, plan: Plan, sequence: Sequence, num_decodes: int, *, most: int | None = None
    ) -> None:
        left = self._config.max_batch_tokens - plan.num_tokens
        pending = sequence.num_pending - (0 if sequence.may_sample else 1)
        num = min(pending, self._config.prompt_chunk, left)
        num = num if most is None else min(num, most)
        if num_decodes:
            num = self._within_gap(plan, sequence, num, plan.num_tokens - num_decodes)
        if num:
            plan.add(sequence, num)

    def _allowed_gap(self, plan: Plan) -> float:
        """How long the step is to be expected to take: as long as is wished for, or twice what its
        decodes take, less a reserve for what takes longer than expected.

        Where the decodes alone come near the target, prompts would else trickle in, and with them
        the throughput that more sequences bring. So the reserve leaves prompts half of their time.
        """
        alone = (self._cost.seconds(plan.work) if plan.num_tokens else None) or 0.0
        wished = max(self._config.target_gap, 2 * alone)
        return max(wished / self._cost.reserve, (wished + alone) / 2)

    def _within_gap(self, plan: Plan, sequence: Sequence, most: int, prompt_tokens: int) -> int:
        """How much of `most` does not hold up those who decode, beside prompts in the plan."""
        num = self._cost.chunk(
            plan.work, computed=sequence.num_computed, most=most, limit=self._gap
        )
        if num is None:
            return min(most, max(0, UNMEASURED_CHUNK - prompt_tokens))
        return num if prompt_tokens else max(num, min(most, LEAST_CHUNK))

    def _add_drafts(self, plan: Plan, speculator: Speculator) -> None:
        for sequence, drafts in speculator.propose(plan).items():
            room = self._draft_room(sequence, len(drafts))
            kept = drafts[:room] if sequence.guide is None else sequence.guide.admit(drafts[:room])
            if kept:
                plan.draft(sequence, kept)

    def _draft_room(self, sequence: Sequence, num: int) -> int:
        """Slots for that many drafts, or for fewer where blocks are short."""
        size = self._allocator.block_size
        missing = self._allocator.blocks_for(sequence.num_tokens + num) - len(sequence.blocks)
        if missing > 0 and self._allocator.num_free >= missing + len(self.running):
            sequence.blocks += self._allocator.take(missing) or []
        return min(num, len(sequence.blocks) * size - sequence.num_tokens)

    def _learn(self, sequence: Sequence, num: int, hits: int) -> None:
        if self._speculator is not None:
            self._speculator.learn(sequence, num=num, hits=hits)

    def _admit(self, plan: Plan, num_decodes: int) -> None:
        """Seats those who are next until one does not fit: it is waited for, not overtaken.

        So is one that was preempted with a token unread, which nobody could compute again.
        """
        while self._seats and plan.num_tokens < self._config.max_batch_tokens:
            sequence = self._order.peek()
            if sequence is None or sequence.num_unread or not self._take_blocks(sequence):
                return
            self._seat(plan, sequence)
            self._plan_chunk(plan, sequence, num_decodes)
            if sequence not in plan.tokens and sequence.may_sample:
                return  # the time of this step is used up

    def _seat(self, plan: Plan, sequence: Sequence) -> None:
        """The sequence, which has its blocks, runs from now on."""
        self._order.admitted(sequence)
        sequence.status = SequenceStatus.RUNNING
        sequence.seat = self._seats.pop()
        self.running.append(sequence)
        hit = min(sequence.num_computed, sequence.num_prompt)
        plan.prefix_hit_tokens += hit
        if not sequence.preemptions:
            sequence.num_cached = hit
            self._order.charge(sequence.tenant, sequence.num_pending)

    def _slots_to_begin(self, sequence: Sequence) -> int:
        """Its tokens and a first block of output, as far as it can come to need them."""
        return min(sequence.num_tokens + self._allocator.block_size, _slots(sequence.request))

    def _take_blocks(self, sequence: Sequence) -> bool:
        """The table of a sequence to admit, as far as possible from the prefix cache.

        A hit never covers the last token: its logits are needed, and the cache has none.
        """
        size = self._allocator.block_size
        num_findable = 0 if sequence.scores_prompt else (sequence.num_tokens - 1) // size
        shared = self._allocator.find(self._digests(sequence, num_findable))
        num_new = self._allocator.blocks_for(self._slots_to_begin(sequence)) - len(shared)
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

    def _publish(self, sequence: Sequence, num_full: int) -> None:
        digests = self._digests(sequence, num_full)
        for index in range(sequence.num_published, len(digests)):
            self._allocator.publish(sequence.blocks[index], digests[index])
        sequence.num_published = num_full

    def _preempt(self, plan: Plan, sequence: Sequence) -> None:
        plan.preempted.append(sequence)
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


def _advance(sequence: Sequence, num: int) -> None:
    computed = sequence.num_computed = sequence.num_computed + num
    sequence.high_water = max(sequence.high_water, computed)


def _slots(request: GenerationRequest) -> int:
    """Slots that a request can come to need: the last token's KV is never stored."""
    return request.max_total_tokens - 1
