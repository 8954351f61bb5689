"""Queues: between API and engines. This module opens the one that a URL names; the Protocol is in
`contract`, the implementations are `memory` (embedded, one process) and `redis`.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from service.errors import StartupError
from service.queues.contract import Queue, QueueLimits
from service.queues.observer import QueueObserver

QueueFactory = Callable[[str, QueueLimits, QueueObserver], Queue]


def _memory(_url: str, limits: QueueLimits, observer: QueueObserver) -> Queue:
    from service.queues.memory.queue import MemoryQueue

    return MemoryQueue(limits, observer=observer)


def _redis(url: str, limits: QueueLimits, observer: QueueObserver) -> Queue:
    from service.queues.redis.sharded import open_redis

    return open_redis(url, limits, observer)


QUEUES: dict[str, QueueFactory] = {
    "memory": _memory, "redis": _redis, "rediss": _redis, "unix": _redis,
    "redis+cluster": _redis, "rediss+cluster": _redis,
    "redis+sentinel": _redis, "rediss+sentinel": _redis,
}  # fmt: skip
"""URL scheme -> factory."""


def open_queue(url: str, limits: QueueLimits, *, observer: QueueObserver | None = None) -> Queue:
    """The queue that a URL names. Raises StartupError if the URL is malformed or its scheme is
    unknown.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError:
        raise StartupError("queue: the URL is malformed") from None
    if scheme not in QUEUES:
        raise StartupError(f"queue: unknown scheme; known are {', '.join(sorted(QUEUES))}")
    return QUEUES[scheme](url, limits, QueueObserver() if observer is None else observer)
