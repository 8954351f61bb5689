"""Jobs: the files and batches of one process, with their limits."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from service.batches.batches import Batches
from service.batches.calls import AnswerLine
from service.batches.files import FileLimits, Files
from service.batches.runner import Runner
from service.batches.storage import Storage
from service.queues.contract import Queue


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLimits:
    """`url` is the place of files and batches; by default the memory of this process."""

    url: str = field(default_factory=lambda: f"memory://{secrets.token_hex(8)}")
    files: FileLimits = field(default_factory=FileLimits)
    max_open: int = 16  # batches per tenant
    window: int = 64  # lines in flight of all batches
    max_line_bytes: int = 4 * 2**20


class Jobs:
    """The parts, made from the limits. Nothing is read before it is needed."""

    def __init__(
        self, limits: JobLimits, queue: Queue, answer: AnswerLine, *, draining: Callable[[], bool]
    ) -> None:
        self._storage = Storage(limits.url)
        self.files = Files(self._storage, limits.files)
        self.batches = Batches(self._storage, max_open=limits.max_open)
        self.runner = Runner(
            self._storage,
            self.batches,
            queue,
            answer,
            window=limits.window,
            max_line_bytes=limits.max_line_bytes,
            draining=draining,
        )

    def close(self) -> None:
        """Cancels work that waits for the storage."""
        self._storage.close()
