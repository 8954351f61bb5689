"""Scoring: log probabilities of given continuations of one prompt.

A request with `scored` is no sequence. Each continuation becomes one, which may answer with the
last token of the continuation alone:

    request r      prompt p, scored (a b) (a c) (d)
    sequences      r#0  p a -> b        r#1  p a -> c        r#2  p -> d
    answer of r    b c d, each with its log probability

The first sequence runs alone: the others find the prompt in the prefix cache. After that, each
request has one sequence at least, and more while the scheduler has room. Results are delivered in
the order of the continuations, so an engine that continues another one's request computes those
that are not in the journal. Independent of the scheduler and of the runner.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from service.engine.inbox import Work
from service.errors import BadRequest
from service.messages import (
    End,
    Event,
    FinishReason,
    GenerationRequest,
    Tokens,
    merge_tokens,
    rolling_digest,
)


@dataclass(slots=True, kw_only=True, eq=False)
class _Scored:
    """A request. Continuations `count .. next - 1` are in flight or `done`."""

    work: Work
    received: float  # on the engine's clock
    count: int  # tokens delivered or journalled
    next: int  # the continuation to enqueue next
    digest: int
    in_flight: set[str] = field(default_factory=set)  # sequences
    done: dict[int, Tokens] = field(default_factory=dict)  # by continuation
    cached_tokens: int | None = None  # of the first sequence; None: it has not ended
    ended: bool = False

    @property
    def request(self) -> GenerationRequest:
        return self.work.request

    @property
    def has_left(self) -> bool:
        """Whether there are continuations to enqueue."""
        return not self.ended and self.next < len(self.request.scored)

    def take(self) -> Iterator[Event]:
        """The events that are due: results in order, and the end after the last one."""
        if self.ended:
            return
        records = []
        while (record := self.done.pop(self.count, None)) is not None:
            self.digest = rolling_digest(record.ids, previous=self.digest)
            first = self.count == 0
            records.append(
                replace(
                    record,
                    start=self.count,
                    text="",
                    digest=self.digest,
                    numeric_class=record.numeric_class if first else "",
                )
            )
            self.count += 1
        if records:
            yield Event(self.request.id, merge_tokens(records))
        if self.count == len(self.request.scored):
            yield self.end(FinishReason.LENGTH)

    def end(self, reason: FinishReason, *, error: str | None = None) -> Event:
        """The terminal record."""
        self.ended = True
        end = End(
            count=self.count,
            reason=reason,
            cached_tokens=self.cached_tokens or 0,
            error=error,
            ended_at=int(time.time()),
        )
        return Event(self.request.id, end)


class Scoring:
    """The requests of an engine that score. Used from the engine's thread."""

    def __init__(self) -> None:
        self._requests: dict[str, _Scored] = {}
        self._parts: dict[str, tuple[_Scored, int]] = {}  # sequence -> request, continuation

    def __bool__(self) -> bool:
        return bool(self._requests)

    def begin(self, work: Work, received: float) -> None:
        """Takes a request. Raises BadRequest."""
        request, count = work.request, len(work.tokens)
        if not all(request.scored) or request.max_tokens != len(request.scored):
            raise BadRequest("a scored continuation must have a token", code="invalid_value")
        self._requests[request.id] = _Scored(
            work=work,
            received=received,
            count=count,
            next=count,
            digest=rolling_digest(work.tokens),
        )

    def drop(self, request_id: str) -> set[str]:
        """Forgets a request. Returns its sequences, which are of no use any more."""
        found = self._requests.pop(request_id, None)
        if found is None:
            return set()
        for part in found.in_flight:
            del self._parts[part]
        return found.in_flight

    def due(self, room: int) -> Iterator[tuple[Work, float]]:
        """The sequences to enqueue, with the times at which their requests came. `room`: that the
        scheduler has for others than the first of each request.
        """
        left = [each for each in self._requests.values() if each.has_left]
        for each in left:
            if not each.in_flight:
                yield self._next(each)
                room -= 1
        ready = deque(each for each in left if each.has_left and each.cached_tokens is not None)
        while ready and room > 0:
            yield self._next(ready[0])
            room -= 1
            ready.rotate(-1)
            if not ready[-1].has_left:
                ready.pop()

    def _next(self, scored: _Scored) -> tuple[Work, float]:
        request, number = scored.request, scored.next
        *before, token = request.scored[number]
        part = replace(
            request,
            id=f"{request.id}#{number}",
            prompt_ids=(*request.prompt_ids, *before),
            sampling=replace(request.sampling, allowed=(token,)),
            max_tokens=1,
            scored=(),
        )
        scored.next += 1
        scored.in_flight.add(part.id)
        self._parts[part.id] = scored, number
        return Work(request=part, remaining_ms=scored.work.remaining_ms), scored.received

    def absorb(self, events: list[Event]) -> list[Event]:
        """Replaces the events of sequences by those of their requests; leaves all others."""
        if not self._requests:
            return events
        found = [event for event in events if event.request_id not in self._parts]
        for event in events:
            if event.request_id in self._parts:
                found += self._read(event)
        for scored in [*self._requests.values()]:
            found += scored.take()
            if scored.ended and not scored.in_flight:
                del self._requests[scored.request.id]
        return found

    def _read(self, event: Event) -> Sequence[Event]:
        """Reads a record of a sequence. Returns the end of its request if it failed."""
        scored, number = self._parts[event.request_id]
        record = event.record
        if isinstance(record, Tokens):
            scored.done[number] = record
            return ()
        del self._parts[event.request_id]
        scored.in_flight.discard(event.request_id)
        if scored.cached_tokens is None:
            scored.cached_tokens = record.cached_tokens
        if record.count or scored.ended:
            return ()
        return [*scored.take(), scored.end(record.reason, error=record.error)]
