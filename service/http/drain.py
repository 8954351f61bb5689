"""Draining: how a replica stops serving, and the signals that start it.

    SIGTERM          open responses get `drain_timeout` seconds to end
    SIGINT           at most `INTERRUPTED_DRAIN` seconds: a user waits for the prompt
    a second signal  no time

Then each response that is still open ends with the error `shutting_down`, which names the id by
which another replica resumes it. Connections that are open `CLOSE_TIMEOUT` seconds later are
dropped.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Collection
from typing import Any

from service.http.listeners import Listener

log = logging.getLogger("quire")

INTERRUPTED_DRAIN = 10.0
"""Seconds, at most, that open responses get to end after SIGINT."""
CLOSE_TIMEOUT = 3.0
"""Seconds that clients get to read the error that ends their response."""


class StopSignals:
    """Events that SIGTERM and SIGINT set, from now on."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._interrupted = False
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._take, number)

    def _take(self, number: int) -> None:
        if self.first.is_set():
            self.second.set()
            return
        self._interrupted = number == signal.SIGINT
        self.first.set()

    def time_to_drain(self, drain_timeout: float) -> float:
        """Seconds that open responses get to end."""
        return min(drain_timeout, INTERRUPTED_DRAIN) if self._interrupted else drain_timeout


async def drain(
    listener: Listener,
    serving: asyncio.Task[None],
    *,
    seconds: float,
    hurry: Collection[asyncio.Task[Any]],
    close_answers: Callable[[], None],
) -> None:
    """Stops a listener that is `serving`: takes no new connections, and waits for open responses.

    After `seconds`, or when one of the tasks in `hurry` is done, `close_answers` must end them.
    """
    listener.stop()
    if not any(task.done() for task in hurry):
        log.info(
            "shutting down: open responses get %g s to end; a second signal ends them at once",
            seconds,
        )
    await asyncio.wait([serving, *hurry], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        close_answers()
        await asyncio.wait([serving], timeout=CLOSE_TIMEOUT)
    if not serving.done():
        await listener.cut_off()
        await asyncio.wait([serving], timeout=CLOSE_TIMEOUT)
    listener.stop(at_once=True)
