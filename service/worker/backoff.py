"""Backoff: pauses between the retries of a call."""

from __future__ import annotations

import asyncio

FIRST, LONGEST = 0.05, 1.0  # seconds


class Backoff:
    """Each pause is twice as long as the previous one, up to `LONGEST`."""

    def __init__(self) -> None:
        self._delay = FIRST

    def reset(self) -> None:
        self._delay = FIRST

    async def sleep(self) -> None:
        await asyncio.sleep(self._delay)
        self._delay = min(LONGEST, self._delay * 2)
