"""Relay: the records of all choices of an answer as one sequence, as they come into the journal.

It asks the queue for a choice's next record only when its last one was taken: memory does not
depend on slow readers. While the queue's store is away it waits, then goes on from where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from time import monotonic

from service.api.limits import ApiLimits
from service.api.pieces import ChoiceReader, divergence
from service.errors import GenerationFailed, NotFound, Unavailable
from service.messages import End, Record, Tokens, rolling_digest
from service.queues import Queue

Source = AsyncGenerator[Record, None]


async def follow_choice(
    queue: Queue,
    request_id: str,
    reader: ChoiceReader,
    *,
    limits: ApiLimits,
    restore: Callable[[], Awaitable[bool]],
) -> Source:
    """The records after those that `reader` has read, to the `End`.

    `restore` is asked once where the store lost the request; it says whether it is there again.
    Raises GenerationFailed where the journal vanished, Unavailable where the store stays away.
    """
    give_up: float | None = None
    restored = False
    while True:
        try:
            async for record in queue.follow(request_id, after=reader.count):
                give_up = None
                if isinstance(record, Tokens) and record.start < reader.count < record.end:
                    yield await _beyond(queue, request_id, reader, record=record)
                    continue
                yield record
                if isinstance(record, End):
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


async def _beyond(queue: Queue, request_id: str, reader: ChoiceReader, *, record: Tokens) -> Tokens:
    """The part of `record` that was not read yet.

    A store that lost the journal's tail gets it again from the engine, cut in other places. The
    text of so many tokens depends on these tokens alone, so it is known what was shown of it.
    """
    journal = [r for r in await queue.read(request_id) if isinstance(r, Tokens)]
    journal = [r for r in journal if r.end <= record.end]
    ids = [token for r in journal for token in r.ids]
    if rolling_digest(ids[: reader.count]) != reader.digest or len(ids) != record.end:
        raise divergence()
    return Tokens(
        start=reader.count,
        ids=tuple(ids[reader.count :]),
        text="".join(r.text for r in journal)[reader.num_chars :],
        digest=record.digest,
        logprobs=tuple(logprob for r in journal for logprob in r.logprobs)[reader.count :],
    )


async def merge(sources: Sequence[Source]) -> AsyncGenerator[tuple[int, Record], None]:
    """(index of the source, record) in order of arrival; one record of each is held at most."""
    waiting: dict[asyncio.Task[Record | None], int] = {}

    def ask(index: int) -> None:
        waiting[asyncio.create_task(_next(sources[index]))] = index

    try:
        for index in range(len(sources)):
            ask(index)
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(task)
                record = task.result()
                if record is not None:
                    yield index, record
                    ask(index)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()


async def _next(source: Source) -> Record | None:
    return await anext(source, None)


async def only(source: Source) -> AsyncGenerator[tuple[int, Record], None]:
    """`merge` of a single source, without its tasks: most answers have one choice."""
    async with aclosing(source):
        async for record in source:
            yield 0, record
