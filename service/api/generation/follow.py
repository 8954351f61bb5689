"""Relay: the records of all choices of an answer as one sequence, as they come into the journal.

It asks the queue for a choice's next records only when its last ones were taken: memory does not
depend on slow readers. While the queue's store is away it waits, then goes on from where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from time import monotonic

from service.api.generation.deltas import ChoiceReader
from service.api.generation.replay import Replay, continuation
from service.api.limits import ApiLimits
from service.errors import GenerationFailed, NotFound, Unavailable
from service.messages import Record, Tokens
from service.queues.contract import Queue

Source = AsyncGenerator[Sequence[Record], None]


async def follow_choice(
    queue: Queue,
    request_id: str,
    reader: ChoiceReader,
    *,
    limits: ApiLimits,
    replay: Replay | None,
    restore: Callable[[], Awaitable[bool]],
) -> Source:
    """The records after those that `reader` has read, to the `End`, in batches; a batch must be
    read before the next is asked for.

    With `replay`, what the journal has already comes first, page by page. `restore` is called once
    if the store lost the request; it returns whether the request is there again. Raises
    GenerationFailed if the journal vanished, Unavailable if the store stays away.
    """
    give_up: float | None = None
    restored = False
    while True:
        try:
            async for records in _batches(queue, request_id, reader, replay=replay):
                give_up = None
                yield records
                if reader.end is not None:
                    return
        except Unavailable:
            give_up = give_up or monotonic() + limits.backend_patience
            if monotonic() > give_up:
                raise
            await asyncio.sleep(limits.backend_retry)
        except NotFound:
            if restored or not await restore():
                break
            restored = True
        else:
            break
    raise GenerationFailed("the journal of this answer is gone", code="journal_lost")


async def _batches(
    queue: Queue, request_id: str, reader: ChoiceReader, *, replay: Replay | None
) -> Source:
    if replay is not None:
        async for records in replay.pages(queue, request_id, reader):
            yield records
        if reader.end is not None:
            return
    async for record in queue.follow(request_id, after=reader.count):
        if isinstance(record, Tokens) and record.start != reader.count:
            yield await continuation(queue, request_id, reader, (record,))
        else:
            yield (record,)


async def merge(sources: Sequence[Source]) -> AsyncGenerator[tuple[int, Sequence[Record]], None]:
    """(index of the source, records) in order of arrival; one batch of each is held at most."""
    waiting: dict[asyncio.Task[Sequence[Record] | None], int] = {}

    def ask(index: int) -> None:
        waiting[asyncio.create_task(_next(sources[index]))] = index

    try:
        for index in range(len(sources)):
            ask(index)
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(task)
                records = task.result()
                if records is not None:
                    yield index, records
                    ask(index)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()


async def _next(source: Source) -> Sequence[Record] | None:
    return await anext(source, None)


async def only(source: Source) -> AsyncGenerator[tuple[int, Sequence[Record]], None]:
    """`merge` of a single source, without its tasks: most answers have one choice."""
    async with aclosing(source):
        async for records in source:
            yield 0, records
