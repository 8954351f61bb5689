"""Connections: work that ends when the client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")

DROP = "drop_connection"
"""Key in `scope["state"]` of a function that ends the connection, with what is unsent."""

HEAD_ONLY = "head_only"
"""Key in `scope["state"]`, true for a HEAD request: routes see a GET, and no body is sent."""


async def unless_gone(
    work: Coroutine[Any, Any, T], receive: Receive, *, closing: asyncio.Event
) -> T | None:
    """The result of `work`; None if the client left first, or `closing` was set, and then `work` is
    cancelled.
    """
    working = asyncio.create_task(work)
    await first_of(working, asyncio.create_task(gone(receive)), asyncio.create_task(closing.wait()))
    return None if working.cancelled() else working.result()


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(*tasks: asyncio.Task[Any]) -> None:
    """Waits for the first task to end, ends the others, and raises what the first raised."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
