"""EngineLoop: the engine's thread. inbox -> schedule -> launch -> collect -> update -> outbox.

It owns the scheduler and the answers and calls the runner, all from one thread. Other threads hand
work in and take it back through the inbox; what comes out goes to `deliver`, once a step. It knows
no queue, no lease and no journal. Where the runner's steps overlap, a step is launched before the
one before it is collected (`pipeline`).

                 any thread              |  the engine's thread
    add, abort ------------> inbox ------+-> plan, pack --> runner --> outbox
                                         |              |                 |
                                         |           deliver(events) <----+  of the step before
                             (condition: sleeps while there is nothing to do)

What came of a step is delivered when the next one is packed, just before the runner computes it:
those that are woken by it want the interpreter, and then the engine does not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.runners import overlapped
from service.engine.answer import Answer, without_mask
from service.engine.blocks import BlockAllocator
from service.engine.cost import CostModel
from service.engine.guide import Guides
from service.engine.observer import Observer, StepReport
from service.engine.pack import Packer
from service.engine.pipeline import Computed, Pipeline
from service.engine.plan import EngineConfig, Plan
from service.engine.scheduler import Scheduler
from service.engine.speculate import Speculator, may_speculate
from service.errors import BadRequest
from service.messages import End, Event, FinishReason, GenerationRequest

if TYPE_CHECKING:
    from model.grammar import Grammars
    from model.runners import Runner


STALL_FACTOR = 10.0
STALL_MAX = 20.0
"""Seconds after which a step counts as stalled, however long steps take."""
STALL_DECAY = 0.99
"""By which the slowest step is forgotten, per step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A request to answer, and what earlier engines had already journalled of its answer."""

    request: GenerationRequest
    tokens: tuple[int, ...] = ()
    remaining_ms: int | None = None  # until its deadline


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """What of a step's report is known only when it was computed."""

    duration: float = 0.0
    run_duration: float = 0.0
    num_sampled: int = 0
    num_accepted: int = 0


class EngineLoop:
    """Answers requests with one runner.

    `deliver` is called from the engine's thread and must not block: while it runs, `add` and
    `abort` of other threads wait, so that no event comes out after `abort` returned. `on_failure`
    is called once, from the engine's thread, when the runner or `deliver` raised; the engine does
    nothing any more after that. `cost` is what is known of the runner's speed; it learns on.
    Without `grammars` requests with a grammar are refused. `settle` is called before each step
    computes, after the events before it were delivered; it may block, and then the step waits.
    """

    def __init__(  # noqa: PLR0913  # it makes little itself: most is given
        self,
        runner: Runner,
        *,
        config: EngineConfig,
        token_bytes: Sequence[bytes],
        eos_ids: frozenset[int],
        deliver: Callable[[Sequence[Event]], None],
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        cost: CostModel | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
        grammars: Grammars | None = None,
        settle: Callable[[], None] | None = None,
    ) -> None:
        self.steps = 0
        self.failure: BaseException | None = None
        self.last_progress = clock()
        self._runner = runner
        self._config = config
        self._token_bytes = token_bytes
        self._eos_ids = eos_ids
        self._deliver = deliver
        self._observer = observer
        self._clock = clock
        self._on_failure = on_failure
        self._settle = settle
        self._slowest_step = 0.0  # seconds, of the recent ones
        self._allocator = BlockAllocator(runner.num_blocks, block_size=runner.block_size)
        self._cost = CostModel() if cost is None else cost
        drafts = may_speculate(
            config, exact=runner.exact, overlapped=overlapped(runner) is not None
        )
        self._scheduler = Scheduler(
            config,
            self._allocator,
            max_model_len=runner.config.max_model_len,
            cost=self._cost,
            speculator=Speculator(config, self._cost) if drafts else None,
            numeric_class=runner.numeric_class,
        )
        packer = Packer(
            config,
            block_size=runner.block_size,
            max_model_len=self._scheduler.max_model_len,
            vocab_size=runner.config.vocab_size,
            eos_ids=eos_ids,
        )
        self._pipeline = Pipeline(runner, packer, clock=clock)
        self._outbox: list[Event] = []  # what came of steps and was not delivered yet
        self._since: float | None = None  # from when on the next step's time counts; None: it idles
        self._answers: dict[str, Answer] = {}
        self._guides = Guides(
            grammars, token_bytes=token_bytes, vocab_size=runner.config.vocab_size
        )
        # Reentrant, so that `deliver` may call `abort`.
        self._changed = threading.Condition(threading.RLock())
        self._inbox: deque[tuple[float, Work | _Abort]] = deque()  # with the time it came in
        self._blocked = False  # the last plan left somebody waiting
        self._room = config.max_sequences
        self._num_waiting = 0
        self._stopping = False
        self._busy = False  # the thread does not wait for work
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def room(self) -> int:
        """Requests that it would begin to answer now, by seats and, as a guess, by blocks."""
        with self._changed:
            handed_in = sum(isinstance(command, Work) for _, command in self._inbox)
            return max(0, self._room - handed_in)

    @property
    def newcomers(self) -> int:
        """Requests beyond its room that it takes of tenants below their share: the scheduler makes
        way for them, and they need not wait in the queue for the end of somebody's answer.
        """
        with self._changed:
            handed_in = sum(isinstance(command, Work) for _, command in self._inbox)
            return max(0, self._config.max_newcomers - self._num_waiting - handed_in)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        with self._changed:
            return bool(self._inbox) or self._has_work

    @property
    def _has_work(self) -> bool:
        return bool(self._scheduler.num_sequences or self._pipeline)

    def is_stalled(self, *, at_least: float) -> bool:
        """Whether the thread has had work and finished no step for much longer than steps take.

        The bound is `STALL_FACTOR` of the slowest recent step, between `at_least` and `STALL_MAX`
        seconds. Any thread; takes no lock, which the thread may hold.
        """
        if self.failure is not None:
            return True
        bound = max(at_least, min(STALL_MAX, STALL_FACTOR * self._slowest_step))
        return self._busy and self._clock() - self.last_progress > bound

    def start(self) -> None:
        """Lets the engine run in its own thread until `stop` or a failure."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after the steps under way; what is not finished stays so."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def prepare(self, request: GenerationRequest) -> None:
        """Compiles the request's grammar before it is handed in: no step has to wait for it.

        Any thread; it may take seconds. What is wrong with a grammar is told by the answer's end.
        """
        self._guides.prepare(request)

    def add(self, work: Work) -> None:
        """Hands a request in. One of the same id that is here already is dropped for it."""
        self._put(work)

    def abort(self, request_id: str) -> None:
        """Takes a request back: no event of it comes out any more. Unknown ids are ignored."""
        self._put(_Abort(request_id))

    def step(self) -> bool:
        """Does one step and delivers what came of it; False where there was nothing to do.

        For tests and offline use, where the thread does not run.
        """
        plan = self._advance()
        progressed = bool(plan.tokens or self._outbox or without_mask(self._answers))
        self._flush()
        return progressed

    def _advance(self) -> Plan:
        """Does one step. What came of it is in the outbox."""
        began = self._clock()
        if self._since is None:
            self._since = began
        self._read_inbox()
        if self._pipeline.must_be_read:
            self._collect()
        self._look_ahead()
        plan = self._scheduler.schedule(began)
        self._blocked = self._scheduler.num_waiting > 0
        for sequence in plan.expired:
            self._tell_end(sequence.id, FinishReason.DEADLINE, sequence.num_cached)
        if plan.tokens:
            self._pipeline.launch(plan, meanwhile=self._deliver_before_step)
            self._scheduler.launched(plan)
            self._collect(leave=self._pipeline.most_ahead)
        else:
            self._collect()
            # An empty step is told too: a cancel may have left nothing to do, and blocks to count.
            self._report(plan, _Figures())
        if not (plan.tokens and self._has_work):
            self._since = None
        self._room = self._guess_room()
        self.last_progress = self._clock()
        return plan

    def check_integrity(self) -> None:
        """Raises RuntimeError where bookkeeping contradicts itself. For tests and idle moments."""
        self._scheduler.check_integrity()
        if self._scheduler.num_sequences != len(self._answers):
            raise RuntimeError("one answer a sequence")

    def _put(self, command: Work | _Abort) -> None:
        with self._changed:
            self._inbox.append((self._clock(), command))
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while self._wait():
                plan = self._advance()
                if not (plan.tokens and self.busy):  # else the next step delivers it, and at once
                    self._flush()
            self._collect()
            self._flush()
        except BaseException as failure:  # noqa: BLE001
            # Broad because a thread has nobody above it: whatever a runner or a driver raises, the
            # process must hear of it, or it would live on and hold leases that nobody works on.
            self.failure = failure
            if self._on_failure is not None:
                self._on_failure(failure)

    def _wait(self) -> bool:
        """Sleeps until there is something to do; False where it is to stop."""
        with self._changed:
            self._busy = False
            self._changed.wait_for(lambda: self._stopping or self.busy)
            self.last_progress = self._clock()
            self._busy = not self._stopping
            return self._busy

    def _read_inbox(self) -> None:
        with self._changed:
            commands = list(self._inbox)
            self._inbox.clear()
            for received, command in commands:
                if isinstance(command, _Abort):
                    self._drop(command.request_id)
                else:
                    self._drop(command.request.id)
                    self._accept(command, received)
            self._room = self._guess_room()

    def _drop(self, request_id: str) -> None:
        self._scheduler.abort(request_id)
        self._answers.pop(request_id, None)
        self._outbox = [event for event in self._outbox if event.request_id != request_id]

    def _accept(self, work: Work, received: float) -> None:
        """Lets a request wait, or tells its end where there is nothing left to compute."""
        request = work.request
        try:
            self._check(work)
            guide = self._guides.make(request, tokens=work.tokens)
            answer = Answer(
                request,
                token_bytes=self._token_bytes,
                eos_ids=self._eos_ids,
                tokens=work.tokens,
                guide=guide,
            )
            # An engine died between the last token and the end. If the token limit is reached, the
            # guide has yet to read whether the grammar ends there, too.
            if answer.reason is not None and not (guide and answer.reason is FinishReason.LENGTH):
                self._outbox.append(Event(request.id, answer.end(answer.reason)))
                return
            deadline = None if work.remaining_ms is None else received + work.remaining_ms / 1000
            self._scheduler.add(request, tokens=work.tokens, deadline=deadline, guide=guide)
        except BadRequest as refusal:
            end = End(count=len(work.tokens), reason=FinishReason.ERROR, error=refusal.code)
            self._outbox.append(Event(request.id, end))
            return
        self._answers[request.id] = answer

    def _check(self, work: Work) -> None:
        """Refuses what would break the runner; the API lets none of it through."""
        request, vocab_size = work.request, self._runner.config.vocab_size
        biased = [token for token, _ in request.sampling.logit_bias]
        for ids in (request.prompt_ids, work.tokens, request.stop_token_ids, biased):
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                raise BadRequest(
                    f"token ids must be between 0 and {vocab_size - 1}", code="invalid_token_id"
                )
        if not 0 <= request.sampling.seed < 2**64 or "" in request.stop:
            raise BadRequest("seed must be between 0 and 2**64 - 1, stop not empty")

    def _look_ahead(self) -> None:
        """Computes masks within a step's time; ends the answers that cannot go on."""
        answers = without_mask(self._answers)
        self._guides.mask_time.look(answer.guide for answer in answers.values() if answer.guide)
        for request_id, answer in answers.items():
            reason = answer.verdict
            if reason is not None and (sequence := self._scheduler.abort(request_id)):
                self._tell_end(request_id, reason, sequence.num_cached)

    def _collect(self, *, leave: int = 0) -> None:
        """Reads steps until `leave` are under way; what sequences got goes to the outbox."""
        while len(self._pipeline) > leave:
            step = self._pipeline.collect()
            num_sampled, num_accepted = self._take(step)
            now = self._clock()
            duration = 0.0 if self._since is None else now - self._since
            self._since = now
            self._slowest_step = max(duration, STALL_DECAY * self._slowest_step)
            self._cost.observe(step.plan.work, duration)
            self.steps += 1
            figures = _Figures(
                duration=duration,
                run_duration=step.run_duration,
                num_sampled=num_sampled,
                num_accepted=num_accepted,
            )
            self._report(step.plan, figures)

    def _take(self, step: Computed) -> tuple[int, int]:
        """(tokens sampled, drafts among them) of what a step brought to sequences still here."""
        plan, outcome = step.plan, step.outcome
        for sequence, scores in outcome.prompt_logprobs.items():
            if sequence.is_alive:
                told = self._answers[sequence.id].prompt_logprobs
                for position, score in scores:
                    told[position] = score
        runs: list[tuple[int, ...]] = []
        num_accepted = 0
        for sequence, run, logprobs in zip(
            plan.sampling, outcome.runs, outcome.logprobs, strict=True
        ):
            ids: tuple[int, ...] = ()
            if sequence.is_alive:
                record = self._answers[sequence.id].take(run, logprobs)
                self._outbox.append(Event(sequence.id, record))
                ids = record.ids
                num_accepted += len(ids) - 1
            runs.append(ids)
        self._scheduler.update(plan, runs)
        for sequence in plan.sampling:
            if sequence.is_alive and (reason := self._answers[sequence.id].reason) is not None:
                self._scheduler.finish(sequence)
                self._tell_end(sequence.id, reason, sequence.num_cached)
        return sum(map(len, runs)), num_accepted

    def _tell_end(self, request_id: str, reason: FinishReason, cached_tokens: int) -> None:
        end = self._answers.pop(request_id).end(reason, cached_tokens=cached_tokens)
        self._outbox.append(Event(request_id, end))

    def _flush(self) -> None:
        """Delivers all events but those of requests that were aborted or replaced meanwhile."""
        with self._changed:
            events, self._outbox = self._outbox, []
            stale = {
                command.request_id if isinstance(command, _Abort) else command.request.id
                for _, command in self._inbox
            }
            fresh = [event for event in events if event.request_id not in stale]
            if fresh:
                self._deliver(fresh)

    def _deliver_before_step(self) -> None:
        self._flush()
        if self._settle is not None:
            self._settle()

    def _report(self, plan: Plan, figures: _Figures) -> None:
        allocator = self._allocator
        self._observer.stepped(
            StepReport(
                duration=figures.duration,
                run_duration=figures.run_duration,
                num_tokens=plan.num_tokens,
                num_sequences=len(plan.tokens),
                num_sampled=figures.num_sampled,
                num_drafts=plan.num_drafts,
                num_accepted=figures.num_accepted,
                running=len(self._scheduler.running),
                waiting=self._scheduler.num_waiting,
                blocks_used=allocator.num_used,
                blocks_cached=allocator.num_cached,
                blocks_free=allocator.num_free,
                preempted=tuple(sequence.id for sequence in plan.preempted),
                recomputed_tokens=plan.recomputed_tokens,
                prefix_hit_tokens=plan.prefix_hit_tokens,
                prompt_tokens=plan.prompt_tokens,
            )
        )

    def _guess_room(self) -> int:
        """Free seats, less where the blocks would not last for requests like those that run."""
        scheduler = self._scheduler
        self._num_waiting = scheduler.num_waiting
        seats = self._config.max_sequences - scheduler.num_sequences
        if self._blocked:
            return 0
        if not scheduler.running:
            return seats
        total = sum(sequence.max_total_tokens for sequence in scheduler.running)
        blocks_each = self._allocator.blocks_for(-(-total // len(scheduler.running)))
        return min(seats, self._allocator.num_free // blocks_each - scheduler.num_waiting)
