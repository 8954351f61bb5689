"""Inbox: requests and aborts on their way from any thread to the engine's thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from service.engine.plan import EngineConfig
from service.messages import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A request, and the output tokens that earlier engines have journalled."""

    request: GenerationRequest
    tokens: tuple[int, ...] = ()
    remaining_ms: int | None = None  # until its deadline


@dataclass(frozen=True, slots=True)
class Command:
    """What to do about a request: begin `work`, or abort if it is None."""

    request_id: str
    work: Work | None
    received: float  # on the engine's clock


class Inbox:
    """Commands not read yet, and how many more requests the engine has room for.

    `changed` guards everything here. It is notified when a command arrives or `stopping` is set; it
    is reentrant, so that `deliver` may call `abort`.
    """

    def __init__(self, config: EngineConfig, *, clock: Callable[[], float]) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.stopping = False
        self._clock = clock
        self._commands: deque[Command] = deque()
        self._max_under_served = config.max_under_served
        self._room = config.max_sequences  # at the latest step
        self._num_waiting = 0

    def __len__(self) -> int:
        return len(self._commands)

    @property
    def room(self) -> int:
        with self.changed:
            return max(0, self._room - self._num_new())

    @property
    def under_served_room(self) -> int:
        with self.changed:
            return max(0, self._max_under_served - self._num_waiting - self._num_new())

    def set_room(self, room: int, *, num_waiting: int) -> None:
        """Called from the engine's thread, after it has read the commands and after each step."""
        self._room, self._num_waiting = room, num_waiting

    def put(self, request_id: str, work: Work | None) -> None:
        with self.changed:
            self._commands.append(Command(request_id, work, self._clock()))
            self.changed.notify_all()

    def take(self) -> list[Command]:
        """All commands, oldest first. Called with the lock held."""
        commands = list(self._commands)
        self._commands.clear()
        return commands

    def request_ids(self) -> set[str]:
        """Requests that are about to be aborted or replaced. Called with the lock held."""
        return {command.request_id for command in self._commands}

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify_all()

    def _num_new(self) -> int:
        return sum(command.work is not None for command in self._commands)
