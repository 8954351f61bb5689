"""Resuming: reads a choice's journal up to the position that a client names.

    journal      | 0 ........ record | record ........ |
    the client   | seen so far ............ |          the record is split, its rest is sent
    the client   | seen so far .................................. |   the journal is behind: wait

A journal is behind its reader if the store lost its tail. The engine that holds the request, or
another one after a failover, writes the same tokens again.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Sequence
from contextlib import aclosing, suppress

from service.api.generation.reader import AnswerReader
from service.api.generation.replay import split
from service.api.openai.stream import Writer
from service.errors import StreamDivergence, Unavailable
from service.messages import End, Record, Tokens, rolling_digest


async def go_to(answer: AnswerReader, writer: Writer, *, choice: int, count: int) -> int:
    """Reads a choice's journal up to `count` tokens, or to its end if the answer has fewer.

    Returns the number of tokens read. Raises Unavailable if the journal stays behind, and
    StreamDivergence if its records contradict each other.
    """
    reader, context = answer.readers[choice], answer.context
    request_id = answer.request_ids[choice]
    while reader.count < count:
        async with aclosing(context.replay.pages(context.queue, request_id, reader)) as pages:
            async for page in pages:
                if await _read(answer, writer, page, choice=choice, count=count):
                    return reader.count
        await _growth(answer, choice=choice)
    return reader.count


async def _read(
    answer: AnswerReader, writer: Writer, page: Sequence[Record], *, choice: int, count: int
) -> bool:
    """Reads records up to `count` tokens; whether they reach it, or the answer's end."""
    reader = answer.readers[choice]
    for record in page:
        if isinstance(record, End):
            return True
        if record.end > count:
            record = await _beginning(answer, record, choice=choice, count=count)  # noqa: PLW2901
        for shown in answer.read(choice, record):
            writer.skip(shown)
        if reader.count == count:
            return True
    return False


async def _beginning(answer: AnswerReader, record: Tokens, *, choice: int, count: int) -> Tokens:
    """The part of a record up to `count` tokens, as it was sent to a client that has it.

    All text was sent but the bytes of an unfinished character and what may begin a stop string.
    """
    reader, manifest = answer.readers[choice], answer.manifest
    known = record.ids[: count - record.start]
    journal = await answer.context.queue.read(answer.request_ids[choice])
    before = [r.ids for r in journal if isinstance(r, Tokens) and r.end <= record.start]
    token_bytes = answer.context.tokenizer.token_bytes
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(b"".join(token_bytes[id_] for ids in [*before, known] for id_ in ids))
    certain = len(text) - max((_held(text, stop) for stop in manifest.stop), default=0)
    digest = rolling_digest(known, previous=reader.digest)
    return split(record, len(known), num_chars=certain - reader.num_chars, digest=digest)[0]


def _held(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop string may begin with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


async def _growth(answer: AnswerReader, *, choice: int) -> None:
    """Returns when the journal has more than was read of it. Raises Unavailable if it has not
    grown for as long as a failover takes.
    """
    queue, reader = answer.context.queue, answer.readers[choice]
    with suppress(TimeoutError):
        async with asyncio.timeout(queue.limits.failover):
            async for _ in queue.follow(answer.request_ids[choice], after=reader.count):
                return
    raise Unavailable(
        "the store lost the end of this answer's journal, and no engine has written it again yet",
        code="journal_behind",
        retry_after=queue.limits.lease,
    )


def diverged(param: str) -> StreamDivergence:
    """The answer differs from what a client names as sent."""
    return StreamDivergence("the journal differs from what was sent", param=param, retryable=False)
