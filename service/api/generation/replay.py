"""Replay: reading what a journal holds already, page by page, for readers that come late.

Many readers may replay long answers at once. `Replay.turn` lets one of them render a page, and then
the event loop serves everything else that is ready, before the next one renders.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from service.api.generation.deltas import ChoiceReader, divergence
from service.errors import GenerationFailed
from service.messages import End, Record, Tokens, rolling_digest
from service.queues.contract import Queue


class Replay:
    """The turns of all readers of one replica."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def turn(self) -> None:
        """Returns when the caller may render a page: first come, first served."""
        async with self._turn:
            await asyncio.sleep(0)

    async def pages(
        self, queue: Queue, request_id: str, reader: ChoiceReader
    ) -> AsyncGenerator[Sequence[Record], None]:
        """The records after those that `reader` has read, as far as the journal goes now.

        A page must be read before the next is asked for. Raises as `Queue.read_page` and
        `continuation` do.
        """
        while page := await queue.read_page(request_id, after=reader.count):
            records = await continuation(queue, request_id, reader, page)
            if not records:
                return
            await self.turn()
            yield records
            if reader.end is not None:
                return


async def continuation(
    queue: Queue, request_id: str, reader: ChoiceReader, records: Sequence[Record]
) -> Sequence[Record]:
    """`records` from exactly where `reader` is; may be fewer than there are.

    They overlap with what was read before, or leave a gap, if the store lost the tail of the
    journal and an engine wrote it again in other pieces. The text of a number of tokens depends on
    these tokens alone, so the rest of a piece is what was not read of its tokens and characters.
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
    """What `reader` has not read of a record that begins before its position."""
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
