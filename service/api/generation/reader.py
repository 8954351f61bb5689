"""Answer: an admitted call as its readers see it: one for streams, bodies and resumed streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from time import monotonic
from types import MappingProxyType

from service.api.context import ApiContext
from service.api.generation.deltas import ChoiceReader, StreamDelta
from service.api.generation.follow import follow_choice, merge, only
from service.api.generation.manifest import Endpoint, Manifest
from service.api.observer import CallReport
from service.errors import DeadlineExceeded, GenerationFailed, QuireError, ShuttingDown
from service.messages import End, FinishReason, Record, Submission, child_ids
from service.queues import SubmitStatus

# Ends of ERROR that come again on a retry.
FATAL = frozenset({"engine_crash_loop", "grammar_failed"})
FAILURES = MappingProxyType({
    "grammar_failed": "the grammar of this answer allows no token here, or takes too much work: "
    "make it less ambiguous",
})  # fmt: skip


def failure_of(end: End) -> QuireError | None:
    """The error of an answer that failed or did not begin in time; None for any other end."""
    if end.reason is FinishReason.ERROR:
        code = end.error or "generation_failed"
        message = FAILURES.get(code, "the engine could not finish this answer")
        return GenerationFailed(message, code=code, retryable=code not in FATAL)
    if end.reason is FinishReason.DEADLINE and end.count == 0:
        return DeadlineExceeded("the deadline passed before the first token")
    return None


class AnswerReader:
    """One reader's way through an answer, from the first record to every choice's end."""

    def __init__(
        self,
        call_id: str,
        manifest: Manifest,
        context: ApiContext,
        *,
        tenant: str,
        arrived: float,
        resumed: bool = False,
        submission: Submission | None = None,
    ) -> None:
        self.id = call_id
        self.manifest = manifest
        self.context = context
        self.request_ids: Sequence[str] = child_ids(call_id, manifest.num_choices)
        self.readers = [
            ChoiceReader(manifest, choice, context.tokenizer, request_id=request_id)
            for choice, request_id in enumerate(self.request_ids)
        ]
        self._tenant = tenant
        self._resumed = resumed  # its reader is not the one who asked for it
        self._arrived = arrived
        self._submission = submission  # what its own reader asked for, to be asked for again
        self._restoring: asyncio.Task[bool] | None = None
        self._first_token: float | None = None
        self._failed = False
        self._interrupted = False

    @property
    def position(self) -> str:
        """The event id: every choice's position, in order."""
        return ",".join(reader.position for reader in self.readers)

    @property
    def completion_tokens(self) -> int:
        """Tokens shown so far, over all choices."""
        return sum(reader.count for reader in self.readers)

    @property
    def ended(self) -> bool:
        """Whether every choice has had its end."""
        return all(reader.end is not None for reader in self.readers)

    async def shown(self) -> AsyncGenerator[Iterator[tuple[int, StreamDelta]], None]:
        """What the records add, as they come, until all choices have ended: iterators of (choice,
        what it adds), each to be exhausted before the next is asked for.

        Both raise GenerationFailed, DeadlineExceeded, StreamDivergence or Unavailable; for a
        response, whose state shows the first two, only if the journal vanished.
        """
        sources = [
            follow_choice(
                self.context.queue,
                request_id,
                reader,
                limits=self.context.limits,
                # The caller of a new request has nothing to catch up with.
                replay=None if self._submission is not None else self.context.replay,
                restore=self._restore,
            )
            for request_id, reader in zip(self.request_ids, self.readers, strict=True)
        ]
        merged = only(sources[0]) if len(sources) == 1 else merge(sources)
        async with aclosing(merged):
            async for choice, records in merged:
                yield self.read_all(choice, records)

    async def _restore(self) -> bool:
        """Submits again, under the same ids, what a store lost before anything of it was shown.

        A store that is cut off from its power loses its last moment, and with it what it had
        accepted then. All choices share one attempt.
        """
        if self._restoring is None:
            self._restoring = asyncio.create_task(self._submit_again())
        return await asyncio.shield(self._restoring)

    async def _submit_again(self) -> bool:
        if self._submission is None or self.completion_tokens:
            return False
        reply = await self.context.queue.submit(self._submission)
        return reply.status in {SubmitStatus.OK, SubmitStatus.EXISTS}

    def read_all(self, choice: int, records: Sequence[Record]) -> Iterator[tuple[int, StreamDelta]]:
        """(choice, what it adds) for each of a choice's next records, read one by one."""
        return ((choice, shown) for record in records for shown in self.read(choice, record))

    def read(self, choice: int, record: Record) -> Iterator[StreamDelta]:
        """What the next record of a choice adds. Raises as `shown` does."""
        if isinstance(record, End):
            self._check_end(record)
        elif self._first_token is None:
            self._first_token = monotonic()
        return self.readers[choice].read(record)

    def _check_end(self, end: End) -> None:
        error = failure_of(end)
        if error is None or self.manifest.endpoint is Endpoint.RESPONSES:  # it has a state for that
            return
        if end.reason is FinishReason.ERROR:
            self._failed = True
            raise error
        if self.completion_tokens == 0:
            raise error

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Counts this reader while the block runs. The answer is cancelled if its last reader here
        leaves before the end and may not come back; in all other cases the queue decides.
        """
        attendance = self.context.attendance
        attendance.enter(self.id)
        try:
            yield
        except asyncio.CancelledError:
            self._interrupted = True
            raise
        finally:
            last = attendance.leave(self.id)
            # An interrupted reader may read on at another replica.
            done = self.ended or self._interrupted or self._resumed
            gone = last and not done and self.manifest.grace == 0
            if gone or self._failed:  # after a failure the other choices are of no use
                attendance.cancel(self.request_ids)

    def interrupt(self, *, streamed: bool) -> ShuttingDown:
        """The error that ends this reader's connection, because the replica ends; not the answer,
        if another process can go on with it.
        """
        self._interrupted = True
        manifest = self.manifest
        if not (self.context.queue.shared and manifest.stored and manifest.width == manifest.keep):
            return ShuttingDown()
        return ShuttingDown(request_id=self.id, last_event_id=self.position if streamed else None)

    def report(self, *, streamed: bool, error: QuireError | None = None) -> None:
        """Reports to the observer how the call ended."""
        reasons = sorted({reader.end.reason.value for reader in self.readers if reader.end})
        outcome = "+".join(reasons) if self.ended else "left"
        if error is not None:
            outcome = error.code
            if error.code == "journal_lost":
                self.context.observer.call_lost(len(self.readers))
        first = self._first_token
        self.context.observer.call_ended(
            CallReport(
                id=self.id,
                tenant=self._tenant,
                endpoint=self.manifest.endpoint.value,
                outcome=outcome,
                streamed=streamed,
                prompt_tokens=self.manifest.prompt_tokens,
                completion_tokens=self.completion_tokens,
                to_first_token=None if first is None else first - self._arrived,
                duration=monotonic() - self._arrived,
            )
        )
