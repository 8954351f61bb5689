"""Resuming: reads a choice's journal up to the position that a client names.

    journal      | 0 ........ record | record ........ |
    the client   | received ............... |          the record is split, its rest is sent
    the client   | received ..................................... |   the journal is behind: wait

The journal is behind its reader if the store lost its tail. The engine that has the request, or
another one after a failover, writes the same tokens again.
"""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import Sequence
from contextlib import aclosing, suppress

from fastapi import Request

from service.api.auth import Tenant
from service.api.context import ApiContext
from service.api.generation.dialect import EventRenderer
from service.api.generation.follow import split
from service.api.generation.manifest import Manifest
from service.api.generation.reader import AnswerReader
from service.errors import BadRequest, StreamDivergence, Unavailable
from service.messages import End, Record, Tokens, rolling_digest

_POSITION = re.compile(r"(0|[1-9][0-9]{0,8})\.([0-9a-f]{6})")


def resumed_reader(
    call_id: str, manifest: Manifest, request: Request, context: ApiContext, tenant: Tenant
) -> AnswerReader:
    """A reader of a stored answer from its beginning, for an HTTP request that names its id."""
    request.state.request_id = call_id
    arrived = request.state.arrived
    return AnswerReader(
        call_id, manifest, context, tenant=tenant.name, arrived=arrived, resumed=True
    )


async def read_to_event(reader: AnswerReader, renderer: EventRenderer, event_id: str) -> None:
    """Reads the journal up to an SSE event id: `<tokens so far>.<6 hex digits of their digest>` for
    each choice, in order, joined by commas.

    Replaying the journal up to there puts the reader and the renderer into the state that they had:
    the bytes that follow are those that followed before. Raises BadRequest, StreamDivergence or
    Unavailable.
    """
    too_long = len(event_id) > reader.context.limits.max_event_id_chars
    positions = [] if too_long else [_POSITION.fullmatch(part) for part in event_id.split(",")]
    if len(positions) != len(reader.choices):
        raise _bad_event_id()
    for choice, position in enumerate(positions):
        if position is None:
            raise _bad_event_id()
        await read_to(reader, renderer, choice=choice, count=int(position[1]))
        if reader.choices[choice].position != position[0]:
            raise StreamDivergence(
                "the journal differs from what was sent", param="last-event-id", retryable=False
            )


def _bad_event_id() -> BadRequest:
    return BadRequest(
        "the event id is not one of this stream", code="invalid_event_id", param="last-event-id"
    )


async def read_to(reader: AnswerReader, renderer: EventRenderer, *, choice: int, count: int) -> int:
    """Reads a choice's journal up to `count` tokens, or to its end if the answer has fewer.

    Returns the number of tokens read. Raises Unavailable if the journal stays behind, and
    StreamDivergence if its records contradict each other.
    """
    position = reader.choices[choice]
    while position.count < count:
        async with aclosing(reader.pages(choice)) as pages:
            async for page in pages:
                if await _read(reader, renderer, page, choice=choice, count=count):
                    return position.count
        await _growth(reader, choice=choice)
    return position.count


async def _read(
    reader: AnswerReader,
    renderer: EventRenderer,
    page: Sequence[Record],
    *,
    choice: int,
    count: int,
) -> bool:
    """Reads records up to `count` tokens; returns whether they reach it, or the answer's end."""
    position = reader.choices[choice]
    for record in page:
        if isinstance(record, End):
            return True
        if record.end > count:
            record = await _received(reader, record, choice=choice, count=count)  # noqa: PLW2901
        for delta in reader.read(choice, record):
            renderer.skip(delta)
        if position.count == count:
            return True
    return False


async def _received(reader: AnswerReader, record: Tokens, *, choice: int, count: int) -> Tokens:
    """The part of a record up to `count` tokens, as it was sent to a client that has it.

    All text was sent but the bytes of an unfinished character and what may begin a stop string.
    """
    position, manifest = reader.choices[choice], reader.manifest
    known = record.ids[: count - record.start]
    journal = await reader.context.queue.read(reader.request_ids[choice])
    before = [r.ids for r in journal if isinstance(r, Tokens) and r.end <= record.start]
    tokenizer = reader.context.tokenizer
    skip = manifest.skip_special_tokens
    token_bytes = tokenizer.token_bytes if skip else tokenizer.visible_bytes
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(b"".join(token_bytes[id_] for ids in [*before, known] for id_ in ids))
    certain = len(text) - max((_held_back(text, stop) for stop in manifest.stop), default=0)
    digest = rolling_digest(known, previous=position.digest)
    return split(record, len(known), num_chars=certain - position.num_chars, digest=digest)[0]


def _held_back(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop string may begin with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


async def _growth(reader: AnswerReader, *, choice: int) -> None:
    """Returns when the journal has more records than were read. Raises Unavailable if it has not
    grown for as long as a failover takes.
    """
    queue, position = reader.context.queue, reader.choices[choice]
    with suppress(TimeoutError):
        async with asyncio.timeout(queue.limits.failover):
            async for _ in queue.follow(reader.request_ids[choice], after=position.count):
                return
    raise Unavailable(
        "the store lost the end of this answer's journal, and no engine has written it again yet",
        code="journal_behind",
        retry_after=queue.limits.lease,
    )
