"""EngineThread: the thread of an engine, its inbox, and what other threads may ask of it.

Requests come and go through the inbox; events go to `deliver`, once per step. What a step computes
is the subclass's: `EngineLoop` generates, `EncodingLoop` encodes.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from service.engine.inbox import Command, Inbox, Work
from service.engine.plan import EngineConfig
from service.engine.timer import StepTimer
from service.messages import Event, GenerationRequest


class EngineThread(ABC):
    """`deliver` is called from the engine's thread and must not block: `add` and `abort` of other
    threads wait meanwhile, so that no event is delivered after `abort` has returned. `on_failure`
    is called once, from the engine's thread, if the runner or `deliver` raised; the engine has
    stopped then. `settle` is called before each step computes, after earlier events were delivered;
    the step waits for it. It returns whether requests are isolated: their tokens are delivered
    before the next step is launched.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        deliver: Callable[[Sequence[Event]], None],
        clock: Callable[[], float],
        on_failure: Callable[[BaseException], None] | None,
        settle: Callable[[], bool] | None,
    ) -> None:
        self.failure: BaseException | None = None
        self._deliver = deliver
        self._on_failure = on_failure
        self._settle = settle
        self._is_isolated = False  # a request of the step before was
        self._inbox = Inbox(config, clock=clock)
        self._timer = StepTimer(clock)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # --- any thread -----------------------------------------------------------------------
    @property
    def steps(self) -> int:
        """Steps computed so far."""
        return self._timer.steps

    @property
    def room(self) -> int:
        """Requests that it would start now, by batch slots and an estimate of their blocks."""
        return self._inbox.room

    @property
    def under_served_room(self) -> int:
        """Requests of under-served tenants that it takes beyond its room: the scheduler preempts
        others for them, so they need not wait in the queue until an output ends.
        """
        return self._inbox.under_served_room

    def held_prefixes(self) -> frozenset[str]:
        """Names of the prefixes in its cache by which requests find it: see `service.prefixes`."""
        return frozenset()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        with self._inbox.changed:
            return bool(self._inbox) or self._has_work

    def is_stalled(self, *, at_least: float) -> bool:
        """Whether the engine failed, or finishes no step for much longer than steps take, and for
        `at_least` that many seconds. Takes no lock.
        """
        return self.failure is not None or self._timer.is_stalled(at_least=at_least)

    def start(self) -> None:
        """Starts the engine's thread, which runs until `stop` or a failure."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after the steps in flight; what is unfinished stays unfinished."""
        self._inbox.stop()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @abstractmethod
    def prepare(self, request: GenerationRequest) -> None:
        """Compiles the request's grammar before it is added, so that no step waits for it. May take
        seconds. Errors of a grammar are reported by the end of the output.
        """

    def add(self, work: Work) -> None:
        """Enqueues a request. It replaces one of the same id."""
        self._inbox.put(work.request.id, work)

    def abort(self, request_id: str) -> None:
        """Drops a request: no event of it is delivered any more. Unknown ids are ignored."""
        self._inbox.put(request_id, None)

    # --- the engine's thread --------------------------------------------------------------
    @property
    @abstractmethod
    def _has_work(self) -> bool:
        """Whether it has requests, or steps in flight."""

    @abstractmethod
    def _advance(self) -> bool:
        """Does one step, whose events wait to be delivered. Returns whether it computed any."""

    @abstractmethod
    def _take_events(self) -> list[Event]:
        """The events that are not delivered yet; they are the caller's from now on."""

    @abstractmethod
    def _begin(self, command: Command) -> None:
        """Carries out a command."""

    @abstractmethod
    def _update_room(self) -> None:
        """Sets the room of the inbox."""

    @abstractmethod
    def _finish(self) -> None:
        """Reads the steps in flight, at the end."""

    def _work(self) -> None:
        try:
            while self._wait():
                computed = self._advance()
                if not (computed and self.busy):  # else the next step delivers it, and at once
                    self._flush()
            self._finish()
            self._flush()
        except BaseException as failure:  # noqa: BLE001
            # Broad because this is the top of a thread: whatever a runner or a driver raises must
            # end the process, or it would live on and hold leases without working on them.
            self.failure = failure
            if self._on_failure is not None:
                self._on_failure(failure)

    def _wait(self) -> bool:
        """Sleeps until there is something to do; False if it is to stop."""
        inbox, timer = self._inbox, self._timer
        with inbox.changed:
            timer.busy = False
            inbox.changed.wait_for(lambda: inbox.stopping or self.busy)
            timer.progress()
            timer.busy = not inbox.stopping
            return timer.busy

    def _read_inbox(self) -> None:
        with self._inbox.changed:
            for command in self._inbox.take():
                self._begin(command)
            self._update_room()

    def _flush(self) -> None:
        """Delivers all events but those of requests that were aborted or replaced meanwhile."""
        with self._inbox.changed:
            events = self._take_events()
            stale = self._inbox.request_ids()
            fresh = [event for event in events if event.request_id not in stale]
            if fresh:
                self._deliver(fresh)

    def _deliver_before_step(self) -> None:
        self._flush()
        if self._settle is not None:
            self._is_isolated = self._settle()
