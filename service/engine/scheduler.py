"""Scheduler: which sequences compute how many tokens in the next step, and which hold which blocks.

It works on ints: no tensors (see `pack`), no text, and no stop condition but the deadline (see
`output`). Its caller decides when a sequence is finished.

    schedule(now)        expire, reserve, rebalance tenants, decodes, prompts, admissions, drafts
    launched(plan)       counts what the step computes, so the next step can be planned
    update(plan, runs)   appends the tokens, publishes full blocks
    computed(plan, t)    learns from the step's duration

A runner computes steps in the order they are launched. So a block may be found, freed or taken by
another sequence while a step that writes it is in flight: its next use is in a later step.

Memory. At admission a sequence takes the blocks of all its tokens and of a first block of output
(fewer if the cache is compressed: see `tables`).
If a running one needs a block and none is free, the youngest of the lowest priority is preempted
(if some tenant is over its share, among the sequences of such tenants; see `shares`): it releases
its blocks, keeps its tokens and recomputes them later. A preempted sequence counts as of the
highest priority in this choice from then on, so only older sequences can preempt it again. The
first in this order is never preempted, so one always makes progress. The same order holds when
sequences are preempted in favour of another tenant.

Time. While any sequence decodes, prompts come in chunks that fit the `StepBudget`. A step of
decodes only may carry drafts: in slots that the sequence has anyway, or in blocks if every running
sequence could still take one more. Drafts preempt nothing, and a block taken for drafts stays with
the sequence, which fills it next. The KV of a rejected draft is overwritten: it was never counted
as computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

from service.engine.adapters import Adapters
from service.engine.blocks import BlockAllocator
from service.engine.cost import CostModel
from service.engine.guide import Guide
from service.engine.held import HeldPrefixes
from service.engine.order import WaitingOrder
from service.engine.plan import EngineConfig, Plan, StepBudget
from service.engine.sequence import Sequence, SequenceStatus, Source
from service.engine.shares import Shares, rank, split_evenly
from service.engine.speculate import Speculator
from service.engine.tables import BlockTables, Retention
from service.errors import BadRequest
from service.messages import GenerationRequest


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
        anchor_ids: frozenset[int] = frozenset(),
        adapters: Adapters | None = None,
        has_encoder: bool = False,
    ) -> None:
        self.max_model_len = min(max_model_len, config.max_model_len or max_model_len)
        self.running: list[Sequence] = []  # in order of admission
        retention = Retention(
            compression=config.kv_compression,
            block_size=allocator.block_size,
            chunk=config.prompt_chunk,
            anchor_ids=anchor_ids,
        )
        self._tables = BlockTables(
            allocator,
            retention=retention,
            adapters=adapters or Adapters(),
            prefix_cache=config.prefix_cache,
        )
        self._config = config
        self._has_encoder = has_encoder
        self._allocator = allocator
        self._cost = cost
        self._speculator = speculator
        self._sequences: dict[str, Sequence] = {}
        self._order = WaitingOrder[Sequence](patience=config.patience)
        self._free_slots = list(range(config.max_sequences - 1, -1, -1))  # a stack: 0 first
        self._arrivals = itertools.count()
        self._left_waiting = False  # the latest plan did not admit all sequences
        self._only_decoded = False  # nor did it compute prompts
        self._read_for: list[Sequence] = []  # for whose drafts a step is read before the next plan

    @property
    def held(self) -> HeldPrefixes:
        """The prefixes to announce."""
        return self._tables.held

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self.running)

    @property
    def num_sequences(self) -> int:
        """Sequences that are not finished."""
        return len(self._sequences)

    @property
    def room(self) -> int:
        """Requests that it could start now: free batch slots, fewer if the free blocks would not
        last for requests of the average length of those running.
        """
        if self._left_waiting:
            return 0
        batch_slots = self._config.max_sequences - len(self._sequences)
        if not self.running:
            return batch_slots
        total = sum(self._tables.most_slots(sequence) + 1 for sequence in self.running)
        blocks_each = self._allocator.blocks_for(-(-total // len(self.running)))
        return min(batch_slots, self._allocator.num_free // blocks_each - self.num_waiting)

    def add(
        self,
        request: GenerationRequest,
        *,
        tokens: tuple[int, ...] = (),
        deadline: float | None = None,
        guide: Guide | None = None,
    ) -> Sequence:
        """Enqueues a request. `tokens` are the output tokens generated so far.

        Raises BadRequest for a request that this engine can never serve, ValueError for an id that
        is already here.
        """
        if request.id in self._sequences:
            raise ValueError("a request of this id is already in the engine")
        self._check_fits(request)
        sequence = Sequence(
            request=request,
            tokens=[*request.prompt_ids[request.source :], *tokens],
            source=Source(tokens=request.prompt_ids[: request.source]) if request.source else None,
            arrival=next(self._arrivals),
            deadline=deadline,
            guide=guide,
        )
        self._sequences[request.id] = sequence
        self._order.enter(sequence)
        return sequence

    def abort(self, request_id: str) -> Sequence | None:
        """Removes a sequence and frees its blocks. Returns None if the id is unknown."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.finish(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Removes a sequence and frees its blocks."""
        del self._sequences[sequence.id]
        if sequence.status is SequenceStatus.RUNNING:
            self._stop(sequence)
        self._order.leave(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self, now: float) -> Plan:
        """Plans a step. It is empty only if each sequence has a token unread or lacks a mask."""
        plan = Plan(expired=self._expire(now), read_for=self._read_for)
        self._read_for = []
        self._reserve(plan)
        self._admit_under_served(plan)
        decodes = [s for s in self.running if s.num_pending == 1 and s.num_remaining]
        plan.add_decodes([s for s in decodes if s.may_sample and not s.lacks_source])
        budget = StepBudget(plan, config=self._config, cost=self._cost)
        self._plan_prompts(plan, budget)
        self._admit(plan, budget)
        self._only_decoded = 0 < plan.work.sampled == plan.num_tokens
        if self._speculator is not None and self._only_decoded:
            self._add_drafts(plan, self._speculator)
        self._left_waiting = self.num_waiting > 0
        return plan

    def expects_drafts(self) -> bool:
        """Whether the step in flight is to be read before the next plan, so that it has drafts."""
        if self._speculator is None or not self._only_decoded:
            return False
        decodes = [s for s in self.running if s.num_unread and s.num_remaining and s.guide is None]
        self._read_for = self._speculator.expects(decodes)
        return bool(self._read_for)

    def launched(self, plan: Plan) -> None:
        """Records that the plan is in flight. Its drafts are neither accepted nor rejected yet."""
        drafts = plan.drafts
        if drafts and not any(sequence.chooses_by_tokens for sequence in plan.tokens):
            self._read_for = list(drafts)
        for source in plan.sources.values():
            source.encoded = True
        for sequence, num in plan.tokens.items():
            _advance(sequence, num - len(drafts[sequence]) if sequence in drafts else num)
        for sequence in plan.sampling:
            sequence.num_unread += 1

    def skip(self, plan: Plan, sequence: Sequence) -> None:
        """Takes back that a launched plan samples a sequence, whose last token is pending again."""
        plan.skipped.add(sequence)
        sequence.num_unread -= 1
        sequence.num_computed -= 1
        sequence.high_water = min(sequence.high_water, sequence.num_computed)

    def update(self, plan: Plan, runs: Iterable[Collection[int]]) -> None:
        """Records that the plan was computed. `runs` has the new tokens of each of `plan.sampling`:
        its accepted drafts and one more, fewer only at the end of the output.

        Sequences that were removed meanwhile get nothing.
        """
        for sequence, new in zip(plan.sampling, runs, strict=True):
            if sequence in plan.skipped:
                continue
            sequence.num_unread -= 1
            if not sequence.is_alive:
                continue
            sequence.tokens.extend(new)
            if sequence in plan.drafts:
                _advance(sequence, len(new) - 1)
                if self._speculator is not None:
                    num = len(plan.drafts[sequence])
                    self._speculator.learn(sequence, num=num, hits=len(new) - 1)
            self._order.charge(sequence.tenant, len(new))
        size = self._allocator.block_size
        for sequence, source in plan.sources.items():
            self._tables.publish_source(sequence, source)
        for sequence in plan.tokens:
            full = sequence.num_computed // size
            if full > sequence.num_published and sequence.status is SequenceStatus.RUNNING:
                self._tables.publish(sequence)

    def computed(self, plan: Plan, seconds: float, *, pause: float = 0.0) -> None:
        """Learns from the duration of a step. Called after `update`. `pause`: seconds before it, in
        which the runner waited for the plan.
        """
        if self._speculator is not None:
            self._speculator.settle(plan, seconds, pause=pause)
        self._cost.observe(plan.work, seconds)

    def check_integrity(self) -> None:
        """Raises RuntimeError if the bookkeeping is inconsistent. For tests and idle moments."""
        self._allocator.check_integrity(
            sequence.held_blocks for sequence in self._sequences.values()
        )
        taken = [s.batch_slot for s in self.running if s.batch_slot is not None]
        if sorted([*self._free_slots, *taken]) != list(range(self._config.max_sequences)):
            raise RuntimeError("a batch slot is lost or taken twice")
        if len(self._order) != self.num_waiting:
            raise RuntimeError("a sequence neither waits nor runs")
        for sequence in self._sequences.values():
            if self._allocator.blocks_for(sequence.num_computed) > len(sequence.blocks):
                raise RuntimeError("a computed token has no block")

    def _check_fits(self, request: GenerationRequest) -> None:
        if len(request.prompt_ids) <= request.source:
            raise BadRequest("the prompt must have at least 1 token", code="empty_prompt")
        if (request.source > 0) is not self._has_encoder:
            raise BadRequest("a prompt has a source if the model has an encoder, and else none")
        if request.max_tokens < 1:
            raise BadRequest("max_tokens must be at least 1", code="integer_below_min_value")
        longest = min(self.max_model_len, self._tables.longest(request.source))
        own = request.max_total_tokens - request.source
        if own > longest or request.source > self.max_model_len:
            raise BadRequest(
                f"prompt and max_tokens exceed {longest} tokens", code="context_length_exceeded"
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
        """Gives each running sequence the blocks of its tokens, preempting if none is free."""
        tables = self._tables
        for sequence in sorted(tables.short(self.running), key=rank):
            while sequence.status is SequenceStatus.RUNNING:
                if tables.extend(sequence):
                    break
                self._preempt(plan, self._shares().victim() or max(self.running, key=rank))

    def _shares(self) -> Shares:
        return Shares(
            self.running,
            num_tenants=self._order.num_tenants,
            num_batch_slots=self._config.max_sequences,
            num_blocks=self._allocator.num_blocks,
        )

    def _admit_under_served(self, plan: Plan) -> None:
        """Admits waiting sequences of tenants below their fair share, preempting others if
        necessary.
        """
        progress = self._order.num_tenants > 1
        while progress:
            shares, progress = self._shares(), False
            for sequence in self._order.heads():
                num_blocks = self._tables.blocks_to_begin(sequence)
                if not sequence.num_unread and shares.covers(sequence, num_blocks=num_blocks):
                    progress |= self._admit_by_preempting(plan, sequence)
                    shares = self._shares()

    def _admit_by_preempting(self, plan: Plan, sequence: Sequence) -> bool:
        while not (self._free_slots and self._tables.open(sequence)):
            victim = self._shares().victim(priority=sequence.request.priority)
            if victim is None:
                return False
            self._preempt(plan, victim)
        self._start(plan, sequence)
        return True

    def _plan_prompts(self, plan: Plan, budget: StepBudget) -> None:
        prompts = [s for s in self.running if s.num_pending > 1 or s.lacks_source]
        for sequence, most in split_evenly(prompts, num_tokens=budget.shared_by(prompts)):
            if num := budget.chunk(sequence, most=most):
                plan.add(sequence, num)

    def _admit(self, plan: Plan, budget: StepBudget) -> None:
        """Admits sequences in order until one does not fit. Nothing overtakes that one.

        A sequence that was preempted with a token unread waits until the token is read.
        """
        while self._free_slots and budget.num_tokens > 0:
            sequence = self._order.peek()
            if sequence is None or sequence.num_unread or not self._tables.open(sequence):
                return
            self._start(plan, sequence)
            if num := budget.chunk(sequence):
                plan.add(sequence, num)
            elif sequence.may_sample:
                return  # the time of this step is used up

    def _add_drafts(self, plan: Plan, speculator: Speculator) -> None:
        for sequence, drafts in speculator.propose(plan).items():
            room = self._draft_room(sequence, len(drafts))
            kept = drafts[:room] if sequence.guide is None else sequence.guide.admit(drafts[:room])
            if kept:
                plan.draft(sequence, kept)

    def _draft_room(self, sequence: Sequence, num: int) -> int:
        """Slots for that many drafts, or for fewer if blocks are short."""
        size = self._allocator.block_size
        missing = self._allocator.blocks_for(sequence.num_tokens + num) - len(sequence.blocks)
        if missing > 0 and self._allocator.num_free >= missing + len(self.running):
            sequence.blocks += self._allocator.take(missing) or []
        return min(num, len(sequence.blocks) * size - sequence.num_tokens)

    def _start(self, plan: Plan, sequence: Sequence) -> None:
        """Moves a waiting sequence, which has its blocks, into the batch."""
        self._order.admitted(sequence)
        sequence.status = SequenceStatus.RUNNING
        sequence.batch_slot = self._free_slots.pop()
        self.running.append(sequence)
        hit = min(sequence.num_computed, sequence.num_prompt)
        if not sequence.lacks_source:
            hit += sequence.request.source
        plan.prefix_hit_tokens += hit
        if not sequence.preemptions:
            sequence.num_cached = hit
            source = sequence.request.source if sequence.lacks_source else 0
            self._order.charge(sequence.tenant, sequence.num_pending + source)

    def _preempt(self, plan: Plan, sequence: Sequence) -> None:
        plan.preempted.append(sequence)
        self._stop(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed = 0
        sequence.preemptions += 1
        self._order.put_back(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Takes a running sequence out of the batch and releases its blocks."""
        self.running.remove(sequence)
        self._tables.close(sequence)
        if sequence.batch_slot is not None:
            self._free_slots.append(sequence.batch_slot)
        sequence.batch_slot = None


def _advance(sequence: Sequence, num: int) -> None:
    computed = sequence.num_computed = sequence.num_computed + num
    sequence.high_water = max(sequence.high_water, computed)
