"""EngineLoop: generates. inbox -> schedule -> launch -> collect -> update -> deliver.

It owns the scheduler and the outputs and calls the runner, all from one thread (see `thread`).
Independent of queues, leases and journals. If the runner's steps overlap, a step is launched before
the previous one is collected (see `pipeline`).

                 any thread              |  the engine's thread
    add, abort ------------> inbox ------+-> plan, pack --> runner --> outputs
                                         |              |                 |
                                         |           deliver(events) <----+  of the step before
                             (condition: sleeps while there is nothing to do)

The events of a step are delivered when the next one is packed, just before the runner computes it:
consumers woken by `deliver` contend for the GIL, which the engine does not need at this point.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING

from model.compression import Anchors
from model.runners import keeps_logits, overlapped
from model.segments import anchor_ids
from service.engine.adapters import Adapters
from service.engine.blocks import BlockAllocator
from service.engine.cost import CostModel
from service.engine.guide import AHEAD
from service.engine.inbox import Command, Work
from service.engine.observer import Observer, StepReport
from service.engine.outputs import Outputs
from service.engine.pack import Packer
from service.engine.pipeline import Computed, Pipeline
from service.engine.plan import EngineConfig, Plan
from service.engine.scheduler import Scheduler
from service.engine.scoring import Scoring
from service.engine.segments import SegmentPacker
from service.engine.sequence import Sequence as EngineSequence
from service.engine.speculate import Speculator, may_speculate
from service.engine.thread import EngineThread
from service.errors import BadRequest
from service.messages import Event, FinishReason, GenerationRequest, ModelCard

if TYPE_CHECKING:
    from model.grammar import Grammars
    from model.runners import Runner


class EngineLoop(EngineThread):
    """Generates the outputs of requests with one runner. `cost` is the initial model of its speed.
    Without `grammars` requests with a grammar are rejected. `visible_bytes` are `token_bytes` with
    names for special tokens, for requests that show them. `adapters`: the runner's, in its order.
    """

    def __init__(  # noqa: PLR0913  # it makes little itself: most is given
        self,
        runner: Runner,
        *,
        config: EngineConfig,
        token_bytes: Sequence[bytes],
        visible_bytes: Sequence[bytes] | None = None,
        eos_ids: frozenset[int],
        deliver: Callable[[Sequence[Event]], None],
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        cost: CostModel | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
        grammars: Grammars | None = None,
        settle: Callable[[], bool] | None = None,
        adapters: Sequence[ModelCard] = (),
    ) -> None:
        super().__init__(config, deliver=deliver, clock=clock, on_failure=on_failure, settle=settle)
        self._observer = observer
        self._allocator = BlockAllocator(runner.num_blocks, block_size=runner.block_size)
        self._cost = CostModel() if cost is None else cost
        anchors: frozenset[int] = frozenset()
        segmented = isinstance(config.kv_compression, Anchors)
        if segmented:
            anchors = anchor_ids(token_bytes, eos_ids)
        speculator = None
        if may_speculate(config, exact=runner.exact):
            ahead = overlapped(runner)
            most_sampled = config.max_batch_tokens if ahead is None else ahead.most_sampled
            speculator = Speculator(
                config,
                self._cost,
                most_sampled=most_sampled,
                pauses=ahead is not None and ahead.beside_host,
            )
        self._may_speculate = speculator is not None
        numbered = Adapters(runner.numeric_class, adapters)
        self._scheduler = Scheduler(
            config,
            self._allocator,
            max_model_len=runner.config.max_model_len,
            cost=self._cost,
            has_encoder=runner.config.encoder is not None,
            speculator=speculator,
            anchor_ids=anchors,
            adapters=numbered,
        )
        vocab_size = runner.config.vocab_size
        packer = (SegmentPacker if segmented else Packer)(
            config,
            block_size=runner.block_size,
            max_model_len=self._scheduler.max_model_len,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
            adapters=numbered,
            anchor_ids=anchors,
        )
        self._pipeline = Pipeline(runner, packer, clock=clock)
        self._outputs = Outputs(
            token_bytes=token_bytes,
            visible_bytes=visible_bytes or token_bytes,
            eos_ids=eos_ids,
            vocab_size=vocab_size,
            grammars=grammars,
            adapters=numbered,
            may_be_open=keeps_logits(runner),
        )
        self._scoring = Scoring()

    # --- any thread -----------------------------------------------------------------------
    def held_prefixes(self) -> frozenset[str]:
        return self._scheduler.held.names()

    def prepare(self, request: GenerationRequest) -> None:
        self._outputs.guides.prepare(request)

    # --- the engine's thread --------------------------------------------------------------
    def step(self) -> bool:
        """Does one step and delivers its events; False if there was nothing to do.

        For tests and offline use, without the thread.
        """
        computed = self._advance()
        outputs = self._outputs
        progressed = bool(computed or outputs.undelivered or outputs.without_mask())
        self._flush()
        return progressed

    def check_integrity(self) -> None:
        """Raises RuntimeError if the bookkeeping is inconsistent. For tests and idle moments."""
        self._scheduler.check_integrity()
        if self._scheduler.num_sequences != len(self._outputs.builders):
            raise RuntimeError("there must be one output per sequence")

    @property
    def _has_work(self) -> bool:
        return bool(self._scheduler.num_sequences or self._pipeline or self._scoring)

    def _finish(self) -> None:
        self._collect()

    def _advance(self) -> bool:
        began = self._timer.begin()
        self._read_inbox()
        if self._is_isolated:  # each token is journalled before the next is computed
            self._collect()
            self._deliver_before_step()
        elif self._pipeline.must_be_read(
            len(self._scheduler.running) if self._may_speculate else inf
        ) or (self._pipeline and self._scheduler.expects_drafts()):
            self._collect()
        self._enqueue_scored()
        self._compute_masks()
        plan = self._scheduler.schedule(began)
        for sequence in plan.expired:
            self._end(sequence, FinishReason.DEADLINE)
        if plan.tokens:
            self._pipeline.launch(plan, meanwhile=self._deliver_before_step)
            self._scheduler.launched(plan)
            self._collect(leave=self._pipeline.most_ahead)
            self._sample_deferred()
        else:
            self._collect()
            # An empty step is reported too: an abort may have freed blocks and left nothing to do.
            self._report(plan)
        if not (plan.tokens and self._has_work):
            self._timer.idle()
            self._pipeline.idle()
        self._update_room()
        self._timer.progress()
        return bool(plan.tokens)

    def _begin(self, command: Command) -> None:
        for name in (command.request_id, *self._scoring.drop(command.request_id)):
            self._scheduler.abort(name)
            self._outputs.drop(name)
        if command.work is not None:
            self._accept(command.work, command.received)

    def _enqueue_scored(self) -> None:
        if self._scoring:
            self._outputs.undelivered = self._scoring.absorb(self._outputs.undelivered)
            for work, received in self._scoring.due(self._scheduler.room):
                self._accept(work, received)

    def _accept(self, work: Work, received: float) -> None:
        """Enqueues a request; ends it at once if there is nothing left to compute."""
        try:
            if work.request.scored:
                self._scoring.begin(work, received)
                return
            builder = self._outputs.begin(work)
            if builder is None:
                return
            deadline = None if work.remaining_ms is None else received + work.remaining_ms / 1000
            self._scheduler.add(
                work.request, tokens=work.tokens, deadline=deadline, guide=builder.guide
            )
        except BadRequest as error:
            self._outputs.reject(work, error)
        else:
            self._outputs.builders[work.request.id] = builder

    def _compute_masks(self) -> None:
        """Computes masks within a step's time; ends the outputs that cannot continue."""
        builders = self._outputs.without_mask()
        self._outputs.guides.mask_time.compute_masks(
            each.guide for each in builders.values() if each.guide
        )
        for request_id, builder in builders.items():
            reason = builder.verdict
            if reason is not None and (sequence := self._scheduler.abort(request_id)):
                self._end(sequence, reason)

    def _sample_deferred(self) -> None:
        """Samples the newest step, if that was deferred, with masks after the tokens just read."""
        if (plan := self._pipeline.deferred) is None:
            return
        alive = (each for each in plan.sampling if each.is_alive and each not in plan.skipped)
        without = [each for each in alive if not each.may_sample]
        self._outputs.guides.mask_time.compute_masks(s.guide for s in without if s.guide)
        for sequence in without:
            if not sequence.may_sample:
                self._scheduler.skip(plan, sequence)
        self._pipeline.sample()

    def _collect(self, *, leave: int = 0) -> None:
        """Reads steps until `leave` are in flight."""
        while len(self._pipeline) > leave:
            step = self._pipeline.collect()
            runs = self._take(step)
            duration = self._timer.count_step()
            # Steps that overlap end when the host comes to read them: then only the runner knows.
            seconds = max(0.0, duration - step.pause) if step.seconds is None else step.seconds
            self._scheduler.computed(step.plan, seconds, pause=step.pause)
            self._report(step.plan, duration=duration, run_duration=step.run_duration, runs=runs)

    def _take(self, step: Computed) -> list[tuple[int, ...]]:
        """Updates sequences and outputs. Returns the new tokens per sampling sequence; empty if the
        sequence was removed, or its grammar failed in an open row: the next step ends it.
        """
        plan, result = step.plan, step.result
        later = self._pipeline.deferred
        for sequence, guide in result.replaced.items():
            if later is not None and sequence in later.sampling:  # which computes the wrong token
                self._scheduler.skip(later, sequence)
                guide.num_ahead = AHEAD
        for sequence, scores in result.prompt_logprobs.items():
            if sequence.is_alive:
                self._outputs.score_prompt(sequence.id, scores)
        runs = [
            self._outputs.extend(sequence.id, run, logprobs)
            if run and sequence.is_alive and sequence not in plan.skipped
            else ()
            for sequence, run, logprobs in zip(
                plan.sampling, result.runs, result.logprobs, strict=True
            )
        ]
        self._scheduler.update(plan, runs)
        builders = self._outputs.builders
        for sequence in plan.sampling:
            if sequence.is_alive and (reason := builders[sequence.id].reason) is not None:
                self._scheduler.finish(sequence)
                self._end(sequence, reason)
        return runs

    def _end(self, sequence: EngineSequence, reason: FinishReason) -> None:
        self._outputs.end(sequence.id, reason, cached_tokens=sequence.num_cached)

    def _take_events(self) -> list[Event]:
        events, self._outputs.undelivered = self._outputs.undelivered, []
        return self._scoring.absorb(events)

    def _update_room(self) -> None:
        scheduler = self._scheduler
        self._inbox.set_room(scheduler.room, num_waiting=scheduler.num_waiting)

    def _report(
        self,
        plan: Plan,
        *,
        duration: float = 0.0,
        run_duration: float = 0.0,
        runs: Sequence[tuple[int, ...]] = (),
    ) -> None:
        allocator = self._allocator
        self._observer.stepped(
            StepReport(
                duration=duration,
                run_duration=run_duration,
                num_tokens=plan.num_tokens,
                num_sequences=len(plan.tokens),
                num_sampled=sum(map(len, runs)),
                num_drafts=plan.num_drafts,
                num_accepted=sum(len(run) - 1 for run in runs if run),
                running=len(self._scheduler.running),
                waiting=self._scheduler.num_waiting,
                blocks_used=allocator.num_used,
                blocks_cached=allocator.num_cached,
                blocks_free=allocator.num_free,
                preempted=tuple(sequence.id for sequence in plan.preempted),
                recomputed_tokens=plan.recomputed_tokens,
                num_skipped=len(plan.skipped),
                prefix_hit_tokens=plan.prefix_hit_tokens,
                prompt_tokens=plan.prompt_tokens,
            )
        )
