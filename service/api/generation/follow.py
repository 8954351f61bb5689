"""Following the journal: the records of all choices of an answer in the order of their arrival.

The next records of a choice are requested from the queue when its last ones were consumed: memory
does not depend on slow readers. A reader that comes late reads what the journal has already in
pages. While the queue's store is down, it retries and then continues from its position.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from time import monotonic

from service.api.generation.deltas import ChoiceReader, divergence
from service.api.http.context import ApiLimits
from service.errors import GenerationFailed, NotFound, Unavailable
from service.messages import End, Record, Tokens, rolling_digest
from service.queues.contract import Queue

Source = AsyncGenerator[Sequence[Record], None]


async def follow_choice(
    queue: Queue,
    request_id: str,
    reader: ChoiceReader,
    *,
    limits: ApiLimits,
    replay_turns: asyncio.Lock | None,
    restore: Callable[[], Awaitable[bool]],
) -> Source:
    """The records after those that `reader` has read, up to the `End`, in batches; each batch must
    be read before the next one is requested.

    With `replay_turns`, the existing journal comes first, page by page. `restore` is called once if
    the store lost the request, and returns whether the request exists again. Raises
    GenerationFailed if the journal vanished, Unavailable if the store stays down.
    """
    give_up: float | None = None
    restored = False
    while True:
        try:
            async for records in _batches(queue, request_id, reader, replay_turns=replay_turns):
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
    queue: Queue, request_id: str, reader: ChoiceReader, *, replay_turns: asyncio.Lock | None
) -> Source:
    if replay_turns is not None:
        async for records in pages(queue, request_id, reader, turns=replay_turns):
            yield records
        if reader.end is not None:
            return
    async for record in queue.follow(request_id, after=reader.count):
        if isinstance(record, Tokens) and record.start != reader.count:
            yield await _continuation(queue, request_id, reader, (record,))
        else:
            yield (record,)


async def pages(
    queue: Queue, request_id: str, reader: ChoiceReader, *, turns: asyncio.Lock
) -> Source:
    """The records after those that `reader` has read, up to the current end of the journal.

    Each page must be read before the next one is requested. Many readers may replay long answers
    at once: each waits for its turn, after which the event loop serves everything else that is
    ready before the next reader renders a page. Raises as `Queue.read_page` and `_continuation` do.
    """
    while page := await queue.read_page(request_id, after=reader.count):
        records = await _continuation(queue, request_id, reader, page)
        if not records:
            return
        async with turns:
            await asyncio.sleep(0)
        yield records
        if reader.end is not None:
            return


async def _continuation(
    queue: Queue, request_id: str, reader: ChoiceReader, records: Sequence[Record]
) -> Sequence[Record]:
    """`records` from exactly where `reader` is; possibly fewer than there are.

    They overlap with what was read before, or leave a gap, if the store lost the tail of the
    journal and an engine wrote it again in records of other sizes. The text of a number of tokens
    depends on these tokens alone, so the rest of a record is its unread tokens and characters.
    Raises StreamDivergence if the tokens differ, GenerationFailed if records are missing.
    """
    count = reader.count
    records = [r for r in records if isinstance(r, End) or r.end > count]
    if not records or isinstance(records[0], End) or records[0].start == count:
        return records
    last = records[-1]
    limit = last.count if isinstance(last, End) else last.end
    journal = [r for r in await queue.read(request_id) if isinstance(r, Tokens) and r.end <= limit]
    before = [r for r in journal if r.end <= count]
    after = [r for r in journal if r.end > count]
    if not after:
        return []  # the store lost them again
    if after[0].start > count:
        raise GenerationFailed("a part of this answer's journal is missing", code="journal_lost")
    if after[0].start < count:
        after[0] = _rest(after[0], before, reader)
    return after


def _rest(record: Tokens, before: Sequence[Tokens], reader: ChoiceReader) -> Tokens:
    """The unread part of a record that begins before the reader's position."""
    known = record.ids[: reader.count - record.start]
    digest = rolling_digest(known, previous=before[-1].digest if before else 0)
    if digest != reader.digest:
        raise divergence()
    num_chars = reader.num_chars - sum(len(r.text) for r in before)
    return split(record, len(known), num_chars=num_chars, digest=digest)[1]


def split(record: Tokens, index: int, *, num_chars: int, digest: int) -> tuple[Tokens, Tokens]:
    """A record in two: `index` tokens with `num_chars` characters and this digest; the rest."""
    middle = record.start + index
    return (
        Tokens(
            start=record.start,
            ids=record.ids[:index],
            text=record.text[:num_chars],
            digest=digest,
            logprobs=record.logprobs[:index],
            prompt_logprobs=record.prompt_logprobs,
        ),
        Tokens(
            start=middle,
            ids=record.ids[index:],
            text=record.text[num_chars:],
            digest=record.digest,
            logprobs=record.logprobs[index:],
        ),
    )


async def merge(sources: Sequence[Source]) -> AsyncGenerator[tuple[int, Sequence[Record]], None]:
    """(index of the source, records) in order of arrival; holds at most one batch per source."""
    if len(sources) == 1:  # most answers have one choice, which needs no tasks
        async with aclosing(sources[0]) as source:
            async for batch in source:
                yield 0, batch
        return
    waiting: dict[asyncio.Task[Sequence[Record] | None], int] = {}

    def request_next(index: int) -> None:
        waiting[asyncio.create_task(_next(sources[index]))] = index

    try:
        for index in range(len(sources)):
            request_next(index)
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(task)
                records = task.result()
                if records is not None:
                    yield index, records
                    request_next(index)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()


async def _next(source: Source) -> Sequence[Record] | None:
    return await anext(source, None)
