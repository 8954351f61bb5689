"""Waiting for conditions. The limits only end a test that would never pass: they are long enough
for a machine on which every process gets a tenth of a core.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from service.errors import Unavailable

PATIENCE = 60.0
"""Seconds that a test waits for one condition; the time limit of a whole test is longer."""

GENEROUS = 10.0
"""Factor on promised times: a test proves what happens, `tests.faults.kills` measures how fast."""


async def until(condition: Callable[[], object]) -> None:
    """Polls the condition while the event loop goes on; raises TimeoutError after PATIENCE."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.002)


async def available(call: Callable[[], Awaitable[Any]]) -> Any:
    """The reply, once there is one: an outage is waited out."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.01)
