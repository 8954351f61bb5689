"""AnswerReader: reads the answer to a request, as a stream, a body or a resumed stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from time import monotonic
from types import MappingProxyType

from service.api.generation.deltas import Accumulator, ChoiceReader, StreamDelta
from service.api.generation.follow import follow_choice, merge, pages
from service.api.generation.manifest import Manifest
from service.api.http.context import ApiContext
from service.api.http.observer import CallReport
from service.errors import DeadlineExceeded, GenerationFailed, QuireError, ShuttingDown
from service.messages import End, FinishReason, Record, Submission, child_ids
from service.queues.contract import SubmitStatus

# Errors that a retry would meet again.
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
        return DeadlineExceeded("no engine of this model began the answer before its deadline")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts so far. A prompt counts once for all of its choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompts, found in the prefix cache
    reasoning_tokens: int = 0  # of the completion tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class AnswerReader:
    """Reads an answer from the first record to the end of every choice."""

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
        """`submission`: for the client that has just submitted it. `resumed`: for any other client
        than the one that submitted it. Raises Unavailable if the model of the answer is not served
        here: its tokens have no text.
        """
        self.id = call_id
        self.manifest = manifest
        self.context = context = context.of_answer(manifest.model, key=manifest.model_key)
        self.request_ids: Sequence[str] = child_ids(call_id, manifest.num_choices)
        self.choices = [
            ChoiceReader(manifest, choice, context.served.tokenizer, request_id=request_id)
            for choice, request_id in enumerate(self.request_ids)
        ]
        self._tenant = tenant
        self._resumed = resumed
        self._arrived = arrived
        self._submission = submission
        self._restoring: asyncio.Task[bool] | None = None
        self._first_token: float | None = None
        self._failed = False
        self._interrupted = False

    @property
    def position(self) -> str:
        """The event id: the positions of all choices, in order."""
        return ",".join(choice.position for choice in self.choices)

    @property
    def completion_tokens(self) -> int:
        """Tokens read so far, over all choices."""
        return sum(choice.count for choice in self.choices)

    @property
    def usage(self) -> Usage:
        """Token counts so far. Of a prompt's cached tokens, the minimum over its choices counts:
        the others may have found what the first one computed.
        """
        cached, width = 0, self.manifest.width
        for first in range(0, len(self.choices), width):
            cached += min(map(self._cached, range(first, first + width)))
        return Usage(
            prompt_tokens=self.manifest.prompt_tokens,
            completion_tokens=0 if self.manifest.prompt_only else self.completion_tokens,
            cached_tokens=cached,
            reasoning_tokens=sum(choice.reasoning_tokens for choice in self.choices),
        )

    def _cached(self, choice: int) -> int:
        """Of the prompt's tokens that count: a decision counts a prompt once."""
        end = self.choices[choice].end
        return 0 if end is None else min(end.cached_tokens, self.manifest.prompt(choice).num_tokens)

    def fingerprint(self, choice: int = 0) -> str:
        """The numeric class that generates a choice; before its first token, the one that this
        replica knew when it admitted the request.
        """
        return self.choices[choice].numeric_class or self.manifest.fingerprint

    @property
    def ended(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.end is not None for choice in self.choices)

    async def deltas(self) -> AsyncGenerator[Iterator[tuple[int, StreamDelta]], None]:
        """The deltas as their records arrive, until all choices have ended: iterators of (choice,
        delta), each to be exhausted before the next one is requested.

        Both raise GenerationFailed, DeadlineExceeded, StreamDivergence or Unavailable. An answer
        with a status shows the first two as its status, and raises only if the journal vanished.
        """
        sources = [
            follow_choice(
                self.context.queue,
                request_id,
                choice,
                limits=self.context.limits,
                # A new request has no journal to catch up with.
                replay_turns=None if self._submission is not None else self.context.replay_turns,
                restore=self._restore,
            )
            for request_id, choice in zip(self.request_ids, self.choices, strict=True)
        ]
        async with aclosing(merge(sources)) as merged:
            async for choice, records in merged:
                yield self._read_all(choice, records)

    async def collect(self) -> list[Accumulator]:
        """All choices, complete. Raises as `deltas` does, and the failure of a single choice."""
        choices = [Accumulator() for _ in self.choices]
        async with aclosing(self.deltas()) as batches:
            async for batch in batches:
                for choice, delta in batch:
                    choices[choice].add(delta)
        if self.manifest.has_status:
            for end in (choice.end for choice in choices):
                failure = None if end is None else failure_of(end)
                if failure is not None:
                    raise failure
        return choices

    async def collect_now(self) -> list[Accumulator]:
        """All choices, up to the current ends of their journals."""
        choices = [Accumulator() for _ in self.choices]
        for index, choice in enumerate(choices):
            async with aclosing(self.pages(index)) as found:
                async for records in found:
                    for _, delta in self._read_all(index, records):
                        choice.add(delta)
        return choices

    def pages(self, choice: int) -> AsyncGenerator[Sequence[Record], None]:
        """The unread records of a choice that exist now: see `follow.pages`."""
        return pages(
            self.context.queue,
            self.request_ids[choice],
            self.choices[choice],
            turns=self.context.replay_turns,
        )

    async def _restore(self) -> bool:
        """Submits again, under the same ids, what a store lost before anything of it was read.

        A store that loses power loses its last moment, and with it what it had accepted then. All
        choices share one attempt.
        """
        if self._restoring is None:
            self._restoring = asyncio.create_task(self._submit_again())
        return await asyncio.shield(self._restoring)

    async def _submit_again(self) -> bool:
        if self._submission is None or self.completion_tokens:
            return False
        reply = await self.context.queue.submit(self._submission)
        return reply.status in {SubmitStatus.OK, SubmitStatus.EXISTS}

    def _read_all(
        self, choice: int, records: Sequence[Record]
    ) -> Iterator[tuple[int, StreamDelta]]:
        return ((choice, delta) for record in records for delta in self.read(choice, record))

    def read(self, choice: int, record: Record) -> Iterator[StreamDelta]:
        """The deltas of the next record of a choice. Raises as `deltas` does."""
        if isinstance(record, End):
            self._check_end(record)
        elif self._first_token is None:
            self._first_token = monotonic()
        return self.choices[choice].read(record)

    def _check_end(self, end: End) -> None:
        error = failure_of(end)
        if error is None or self.manifest.has_status:
            return
        if end.reason is FinishReason.ERROR:
            self._failed = True
            raise error
        if self.completion_tokens == 0:
            raise error

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Counts this reader while the block runs. The answer is cancelled if its last reader on
        this replica leaves before the end and may not come back; otherwise the queue decides.
        """
        readers = self.context.readers
        readers.add(self.id)
        try:
            yield
        except asyncio.CancelledError:
            self._interrupted = True
            raise
        finally:
            last = readers.remove(self.id)
            # An interrupted reader may continue at another replica.
            done = self.ended or self._interrupted or self._resumed
            abandoned = last and not done and self.manifest.grace == 0
            if abandoned or self._failed:  # after a failure the other choices are of no use
                readers.cancel(self.request_ids)

    def interrupt(self, *, streamed: bool) -> ShuttingDown:
        """The error that ends this reader's connection because the replica shuts down. It names the
        position if another replica can continue.
        """
        self._interrupted = True
        manifest = self.manifest
        if not (self.context.queue.shared and manifest.stored and manifest.width == manifest.keep):
            return ShuttingDown()
        return ShuttingDown(request_id=self.id, last_event_id=self.position if streamed else None)

    def report(self, *, streamed: bool, error: QuireError | None = None) -> None:
        """Reports the end of the call to the observer."""
        reasons = sorted({choice.end.reason.value for choice in self.choices if choice.end})
        outcome = "+".join(reasons) if self.ended else "left"
        if error is not None:
            outcome = error.code
            if error.code == "journal_lost":
                self.context.observer.call_lost(len(self.choices), self.manifest.model)
        first, manifest = self._first_token, self.manifest
        self.context.observer.call_ended(
            CallReport(
                id=self.id,
                tenant=self._tenant,
                model=self.manifest.model,
                endpoint=self.manifest.endpoint.value,
                outcome=outcome,
                streamed=streamed,
                prompt_tokens=self.manifest.prompt_tokens,
                completion_tokens=0 if self.manifest.encoding else self.completion_tokens,
                cached_tokens=sum(map(self._cached, range(0, len(self.choices), manifest.width))),
                repeats=self._submission is None,
                to_first_token=None if first is None else first - self._arrived,
                duration=monotonic() - self._arrived,
            )
        )
