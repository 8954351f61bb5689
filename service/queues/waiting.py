"""Waiting for an event, but not forever."""

from __future__ import annotations

import asyncio


async def woken_within(seconds: float | None, event: asyncio.Event) -> bool:
    """Returns whether the event is set in that time; None: however long it takes."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
