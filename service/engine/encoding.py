"""EncodingLoop: encodes. inbox -> pack -> run -> deliver.

An encoding request has inputs, each of which is computed whole in one step and stores nothing. A
step packs waiting inputs, of as many requests as fit, in the order of `order`: priorities, and in
one priority tenants in turns by tokens, input by input. So a request of many inputs spans several
steps, and delays other tenants by one of them at most.

A step takes at most `target_gap` by the cost model: the other models of the process, whose steps
take turns with these, wait no longer. An input that alone takes longer has a step of its own. What
a result is does not depend on the step: an engine that continues another one's request computes the
inputs that are not in the journal, and gets the same bits.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model.runners.encoding import Encoding
from service.engine.cost import CostModel, StepWork
from service.engine.inbox import Command, Work
from service.engine.observer import Observer, StepReport
from service.engine.order import WaitingOrder
from service.engine.plan import UNMEASURED_CHUNK, EngineConfig
from service.engine.thread import EngineThread
from service.errors import BadRequest
from service.messages import (
    EncodingInputs,
    End,
    Event,
    FinishReason,
    GenerationRequest,
    Tokens,
    rolling_digest,
)
from service.vectors import Rows, result_id, to_text

if TYPE_CHECKING:
    from model.runners.encoding import EncodingRunner


@dataclass(slots=True, kw_only=True, eq=False)
class _Encoded:
    """A request: `left` are the inputs that no step has computed."""

    request: GenerationRequest
    arrival: int
    deadline: float | None
    count: int  # results that are delivered or journalled
    digest: int
    left: deque[Encoding] = field(default_factory=deque)

    @property
    def tenant(self) -> str:
        return self.request.tenant


@dataclass(slots=True)
class _Step:
    """Packed inputs, each with its request."""

    owners: list[_Encoded] = field(default_factory=list)
    inputs: list[Encoding] = field(default_factory=list)
    work: StepWork = field(default_factory=StepWork)


class EncodingLoop(EngineThread):
    """Encodes the inputs of requests with one runner."""

    def __init__(
        self,
        runner: EncodingRunner,
        *,
        config: EngineConfig,
        deliver: Callable[[Sequence[Event]], None],
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[BaseException], None] | None = None,
        settle: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__(config, deliver=deliver, clock=clock, on_failure=on_failure, settle=settle)
        self._runner = runner
        self._config = config
        self._clock = clock
        self._observer = observer
        self._cost = CostModel()
        self._requests: dict[str, _Encoded] = {}
        self._order = WaitingOrder[_Encoded](patience=config.patience)
        self._arrivals = itertools.count()
        self._undelivered: list[Event] = []
        self._num_left = 0  # tokens of inputs that no step has computed

    def prepare(self, request: GenerationRequest) -> None:
        """Nothing to prepare."""

    # --- the engine's thread --------------------------------------------------------------
    @property
    def _has_work(self) -> bool:
        return bool(self._requests)

    def _finish(self) -> None:
        """No step is in flight between two calls of `_advance`."""

    def _take_events(self) -> list[Event]:
        events, self._undelivered = self._undelivered, []
        return events

    def _begin(self, command: Command) -> None:
        if command.request_id in self._requests:
            self._leave(self._requests[command.request_id])
        self._undelivered = [e for e in self._undelivered if e.request_id != command.request_id]
        if command.work is None:
            return
        try:
            self._accept(command.work, command.received)
        except BadRequest as error:
            count = len(command.work.tokens)
            end = End(count=count, reason=FinishReason.ERROR, error=error.code)
            self._undelivered.append(Event(command.request_id, end))

    def _accept(self, work: Work, received: float) -> None:
        """Raises BadRequest for what would break the runner; the API lets none of it through."""
        request, tokens = work.request, work.tokens
        encoded = _Encoded(
            request=request,
            arrival=next(self._arrivals),
            deadline=None if work.remaining_ms is None else received + work.remaining_ms / 1000,
            count=len(tokens),
            digest=rolling_digest(tokens),
            left=deque(self._inputs(request)[len(tokens) :]),
        )
        if not encoded.left:  # an engine died between the last result and the end
            self._end(encoded, FinishReason.STOP)
            return
        self._requests[request.id] = encoded
        self._num_left += sum(len(each.ids) for each in encoded.left)
        self._order.enter(encoded)

    def _inputs(self, request: GenerationRequest) -> list[Encoding]:
        info, given = self._runner.info, request.encoding
        if given is None:
            raise BadRequest("this engine encodes only", code="unsupported_model")
        ids, vocab_size = request.prompt_ids, info.vocab_size
        if sum(given.lengths) != len(ids) or request.max_tokens != len(given.lengths):
            raise BadRequest("lengths and token ids differ", code="invalid_value")
        if not (ids and min(ids) >= 0 and max(ids) < vocab_size):
            raise BadRequest(
                f"token ids must be between 0 and {vocab_size - 1}", code="invalid_token_id"
            )
        if not 1 <= min(given.lengths) <= max(given.lengths) <= info.max_tokens:
            raise BadRequest(
                f"an input must have 1 to {info.max_tokens} tokens",
                code="context_length_exceeded",
            )
        return split(ids, given)

    def _advance(self) -> bool:
        began = self._timer.begin()
        self._read_inbox()
        for encoded in [*self._requests.values()]:
            if encoded.deadline is not None and encoded.deadline <= began:
                self._leave(encoded)
                self._end(encoded, FinishReason.DEADLINE)
        step = self._pack()
        if not step.inputs:
            self._report(step)
            self._timer.idle()
        else:
            self._deliver_before_step()
            start = self._clock()
            rows = self._runner.encode(step.inputs)
            run_duration = self._clock() - start
            self._take(step, rows)
            self._cost.observe(step.work, run_duration)
            self._report(step, duration=self._timer.count_step(), run_duration=run_duration)
            if not self._requests:
                self._timer.idle()
        self._update_room()
        self._timer.progress()
        return bool(step.inputs)

    def _pack(self) -> _Step:
        """The next inputs in order, up to the limits of a step; at least one if any waits."""
        step = _Step()
        while (encoded := self._order.peek()) is not None:
            num = len(encoded.left[0].ids)
            work = step.work.plus(num, computed=0, sampled=1)
            if step.inputs and not self._fits(work):
                break
            step.owners.append(encoded)
            step.inputs.append(encoded.left.popleft())
            self._num_left -= num
            step.work = work
            self._order.charge(encoded.tenant, num)
            if not encoded.left:
                self._order.admitted(encoded)
        return step

    def _fits(self, work: StepWork) -> bool:
        if work.tokens > self._config.max_batch_tokens:
            return False
        seconds = self._cost.seconds(work)
        if seconds is None:
            return work.tokens <= UNMEASURED_CHUNK
        return seconds * self._cost.reserve <= self._config.target_gap

    def _take(self, step: _Step, rows: Sequence[Rows]) -> None:
        """One record per request of the step, and the ends of those that are complete."""
        results: dict[_Encoded, list[Rows]] = {}
        for encoded, row in zip(step.owners, rows, strict=True):
            results.setdefault(encoded, []).append(row)
        for encoded, of_request in results.items():
            ids = tuple(map(result_id, of_request))
            encoded.digest = rolling_digest(ids, previous=encoded.digest)
            record = Tokens(
                start=encoded.count,
                ids=ids,
                text="".join(map(to_text, of_request)),
                digest=encoded.digest,
                numeric_class="" if encoded.count else self._runner.numeric_class,
            )
            encoded.count += len(ids)
            self._undelivered.append(Event(encoded.request.id, record))
            if not encoded.left:
                self._leave(encoded)
                self._end(encoded, FinishReason.STOP)

    def _leave(self, encoded: _Encoded) -> None:
        del self._requests[encoded.request.id]
        self._num_left -= sum(len(each.ids) for each in encoded.left)
        self._order.leave(encoded)

    def _end(self, encoded: _Encoded, reason: FinishReason) -> None:
        end = End(count=encoded.count, reason=reason, ended_at=int(time.time()))
        self._undelivered.append(Event(encoded.request.id, end))

    def _update_room(self) -> None:
        """Beyond two steps of work in hand, requests wait in the queue, for any engine. Those of
        under-served tenants need not: each step goes on with the tenant that had the least.
        """
        most, num = self._config.max_sequences, len(self._requests)
        full = self._num_left >= 2 * self._config.max_batch_tokens
        self._inbox.set_room(0 if full else most - num, num_waiting=max(0, num - most))

    def _report(self, step: _Step, *, duration: float = 0.0, run_duration: float = 0.0) -> None:
        self._observer.stepped(
            StepReport(
                duration=duration,
                run_duration=run_duration,
                num_tokens=step.work.tokens,
                num_sequences=len(set(step.owners)),
                num_encoded=len(step.inputs),
                running=len(self._requests),
                prompt_tokens=step.work.tokens,
            )
        )


def split(ids: Sequence[int], inputs: EncodingInputs) -> list[Encoding]:
    """The inputs of a request, for the runner."""
    found, start = [], 0
    firsts = inputs.firsts or inputs.lengths
    for length, first in zip(inputs.lengths, firsts, strict=True):
        types = None if first == length else (0,) * first + (1,) * (length - first)
        found.append(Encoding(ids=tuple(ids[start : start + length]), types=types))
        start += length
    return found
