"""Resuming: back to where a reader was, along the journal, or an error where that is not certain.

The journal's own records say what a reader was shown: a position inside of one was never sent, or
was sent before the store lost the journal's tail and got it again cut in other places. Where the
journal has not come so far as the reader, an engine may be about to write that tail again.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from service.api.answer import Answer
from service.api.events import Writer
from service.errors import StreamDivergence
from service.messages import Tokens


async def go_to(answer: Answer, writer: Writer, *, choice: int, count: int, param: str) -> None:
    """Reads a choice's journal up to `count` tokens. Raises StreamDivergence."""
    reader = answer.readers[choice]
    with suppress(TimeoutError):
        async with asyncio.timeout(answer.context.limits.resume_patience):
            await _read_until(answer, writer, choice=choice, count=count)
    if reader.count != count:
        raise diverged(param)


async def _read_until(answer: Answer, writer: Writer, *, choice: int, count: int) -> None:
    reader = answer.readers[choice]
    if reader.count == count:
        return
    async for record in answer.context.queue.follow(answer.request_ids[choice]):
        if not isinstance(record, Tokens) or record.end > count:
            return
        for shown in answer.read(choice, record):
            writer.skip(shown)
        if reader.count == count:
            return


def diverged(param: str) -> StreamDivergence:
    """The journal does not bear out what a client says that it was sent."""
    return StreamDivergence("the journal differs from what was sent", param=param)
