"""Runner: answers the lines of open batches, at the replica that holds their lease.

    look:   open batches in the storage -> take their leases in the queue -> one task each
    batch:  check the input -> answer the lines of each missing part -> write the part -> end it

A line is a call of the API like any other, at the lowest priority and with an idempotency key made
of the batch and its custom id: a replica that takes over after a death follows the same answer. A
lease that is lost, or a store that forgot it, costs work but never an answer: see `batches`. At
most `window` lines of all batches are in flight per replica, in equal shares of tenants.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import orjson

from service.batches.batches import (
    PART_LINES,
    Batch,
    Batches,
    BatchState,
    InputError,
    read_state,
    write_end,
    write_part,
    write_total,
)
from service.batches.calls import (
    MAX_FAILURES,
    AnswerLine,
    LineCall,
    Verdict,
    answered,
    key_of,
    unanswered,
    verdict,
)
from service.batches.files import data_path
from service.batches.lines import BLOCK_BYTES, Line, LineError, body_of, check
from service.batches.storage import Storage, Tree
from service.errors import NotFound, Unavailable
from service.queues.contract import Queue
from service.queues.waiting import woken_within

log = logging.getLogger(__name__)

LEASES = 3
"""Intervals between two renewals of a batch's lease that it lasts."""
MAX_INTERVAL = 3.0
"""Seconds between two looks at the open batches, at most."""
MAX_PAUSE = 5.0
"""Seconds until a line that was refused is sent again, at most."""
STORED = frozenset({"/v1/responses"})
"""Endpoints whose answers can be read again: they are kept as those of other calls."""
MESSAGES = {
    "cancelled": "the batch was cancelled before this line was answered",
    "expired": "the completion window of the batch ended before this line was answered",
}

Row = tuple[bytes, bytes]


class Slots:
    """Lines in flight per batch, within its share of the window."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._tenants: dict[str, str] = {}  # batch that runs -> its tenant
        self._in_flight: Counter[str] = Counter()
        self._news = asyncio.Event()

    def enter(self, batch: Batch) -> None:
        """A batch begins."""
        self._tenants[batch.id] = batch.tenant

    def leave(self, batch: Batch) -> None:
        """It ends."""
        self._tenants.pop(batch.id, None)
        self._in_flight.pop(batch.id, None)
        self._news.set()

    def share(self, batch_id: str) -> int:
        """The lines that a batch may have in flight."""
        tenants = Counter(self._tenants.values())
        return max(1, self.window // (len(tenants) * tenants[self._tenants[batch_id]]))

    async def take(self, batch_id: str) -> None:
        """Waits for a free slot."""
        while self._in_flight[batch_id] >= self.share(batch_id):
            self._news.clear()
            await self._news.wait()
        self._in_flight[batch_id] += 1

    def give(self, batch_id: str) -> None:
        """Frees a slot."""
        if batch_id in self._tenants:
            self._in_flight[batch_id] -= 1
        self._news.set()


@dataclass(slots=True)
class _Progress:
    """What a replica has of a batch in memory."""

    rows: dict[str, Row] = field(
        default_factory=dict
    )  # custom id -> row, until its part is written
    calls: dict[str, LineCall] = field(default_factory=dict)  # custom id -> its latest call


class Runner:
    """`answer` makes a call of the API. `draining`: whether the replica takes no new work."""

    def __init__(
        self,
        storage: Storage,
        batches: Batches,
        queue: Queue,
        answer: AnswerLine,
        *,
        window: int,
        max_line_bytes: int,
        draining: Callable[[], bool],
    ) -> None:
        self._storage = storage
        self._batches = batches
        self._queue = queue
        self._answer = answer
        self._max_line_bytes = max_line_bytes
        self._draining = draining
        self._slots = Slots(window)
        self._interval = min(MAX_INTERVAL, queue.limits.lease)
        self._owner = secrets.token_hex(8)
        self._running: dict[str, tuple[str, asyncio.Task[None]]] = {}  # batch -> tenant, its task
        self._news = asyncio.Event()

    def wake(self) -> None:
        """Looks for open batches, and for what became of the running ones, now."""
        self._news.set()

    async def run(self) -> None:
        """Until it is cancelled. Then running lines go on in the queue, for another replica."""
        try:
            while True:
                self._news.clear()  # before the look: a batch that comes meanwhile is news
                if not self._draining():
                    with suppress(Unavailable):
                        await self._look()
                await woken_within(self._interval, self._news)
        finally:
            tasks = [task for _, task in self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        waiting = [each for each in await self._batches.open() if each[1] not in self._running]
        while waiting and len(self._running) < self._slots.window:
            own = Counter(tenant for tenant, _ in self._running.values())
            tenant, batch_id = min(
                waiting, key=lambda each: own[each[0]]
            )  # of equal ones, the oldest
            waiting.remove((tenant, batch_id))
            if await self._take_lease(batch_id):
                task = asyncio.create_task(self._hold(tenant, batch_id))
                self._running[batch_id] = tenant, task
                task.add_done_callback(partial(self._ended, batch_id))

    def _ended(self, batch_id: str, task: asyncio.Task[None]) -> None:
        del self._running[batch_id]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("batch %s stopped; it is tried again", batch_id, exc_info=error)

    async def _take_lease(self, batch_id: str) -> bool:
        return await self._queue.take_lease(
            f"batch:{batch_id}", self._owner, seconds=LEASES * self._interval
        )

    async def _hold(self, tenant: str, batch_id: str) -> None:
        """Runs a batch while its lease is held."""
        working = asyncio.create_task(self._work(tenant, batch_id))
        try:
            while not working.done():
                await asyncio.wait([working], timeout=self._interval)
                if self._draining():
                    return
                with suppress(Unavailable):  # then no other replica can take it, either
                    if not working.done() and not await self._take_lease(batch_id):
                        return
            await working
        except NotFound:  # it was forgotten
            return
        except Unavailable as error:
            log.warning("batch %s waits: %s", batch_id, error.message)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            with suppress(Unavailable):
                await self._queue.drop_lease(f"batch:{batch_id}", self._owner)

    async def _work(self, tenant: str, batch_id: str) -> None:
        state = await self._storage.run(tenant, partial(_state, tenant, batch_id))
        batch = state.batch
        if state.end is not None:  # whoever ended it died before it had cleaned up
            await self._end(batch, state.end.status)
            return
        checked = await self._storage.run(
            tenant, partial(_checked, batch, max_bytes=self._max_line_bytes)
        )
        lines, errors = checked
        if errors:
            found = [
                InputError(code=e.code, message=e.message, line=e.line, param=e.param)
                for e in errors
            ]
            await self._end(batch, "failed", found)
            return
        if state.total is None:
            await self._storage.run(tenant, partial(_write_total, batch, len(lines)))
        progress = _Progress()
        status = await self._answer_until_stopped(batch, lines, progress)
        if status is None:
            return
        if status != "completed":
            await self._give_up(batch, lines, progress, status=status)
        await self._end(batch, status)

    async def _answer_until_stopped(
        self, batch: Batch, lines: Sequence[Line], progress: _Progress
    ) -> str | None:
        """The status with which the batch ends; None: another replica has ended it."""
        read = partial(_state, batch.tenant, batch.id)
        self._slots.enter(batch)
        answering = asyncio.create_task(self._answer_all(batch, lines, progress))
        try:
            while True:
                state = await self._storage.run(batch.tenant, read)
                if state.end is not None:
                    return None
                if state.cancelled is not None:
                    return "cancelled"
                if answering.done():
                    await answering
                    return "completed"
                left = batch.expires - time.time()
                if left <= 0:
                    return "expired"
                await asyncio.wait([answering], timeout=min(self._interval, left))
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            self._slots.leave(batch)

    async def _answer_all(self, batch: Batch, lines: Sequence[Line], progress: _Progress) -> None:
        """Answers the lines of all parts that are missing."""
        state = await self._storage.run(batch.tenant, partial(_state, batch.tenant, batch.id))
        try:
            async with asyncio.TaskGroup() as group:
                for number in state.missing:
                    part = _part(lines, number)
                    read = partial(_bodies, batch, part)
                    bodies = await self._storage.run(batch.tenant, read)
                    tasks: list[asyncio.Task[None]] = []
                    for line, body in zip(part, bodies, strict=True):
                        await self._slots.take(batch.id)
                        work = self._answer_line(batch, line.custom_id, body, progress)
                        tasks.append(group.create_task(work))
                    group.create_task(self._finish_part(batch, number, part, tasks, progress))
        except* Unavailable as failures:
            raise Unavailable(str(failures.exceptions[0])) from failures

    async def _finish_part(
        self,
        batch: Batch,
        number: int,
        part: Sequence[Line],
        tasks: Sequence[asyncio.Task[None]],
        progress: _Progress,
    ) -> None:
        """Writes a part when its lines are answered, and lets the queue forget the answers."""
        await asyncio.gather(*tasks)
        rows = [progress.rows[line.custom_id] for line in part]
        await self._storage.run(batch.tenant, partial(_write_part, batch, number, rows))
        calls = [progress.calls.pop(line.custom_id) for line in part]
        for line in part:
            del progress.rows[line.custom_id]
        if batch.endpoint not in STORED:
            await self._forget(calls)

    async def _answer_line(
        self, batch: Batch, custom_id: str, body: bytes, progress: _Progress
    ) -> None:
        try:
            progress.rows[custom_id] = await self._row(batch, custom_id, body, progress)
        finally:
            self._slots.give(batch.id)

    async def _row(self, batch: Batch, custom_id: str, body: bytes, progress: _Progress) -> Row:
        """Calls until there is an answer that counts."""
        attempt = failures = 0
        while True:
            call = LineCall(
                batch.tenant,
                batch.allowance,
                batch.endpoint,
                body,
                key_of(batch, custom_id, attempt),
            )
            progress.calls[custom_id] = call
            reply = await self._answer(call)
            found = verdict(reply)
            failures += found is Verdict.FAILED
            if found is Verdict.FINAL or failures >= MAX_FAILURES:
                return answered(batch, custom_id, reply, call.id or "")
            if found is Verdict.WAIT:
                await asyncio.sleep(min(MAX_PAUSE, reply.retry_after))
            else:
                attempt += 1

    async def _give_up(
        self, batch: Batch, lines: Sequence[Line], progress: _Progress, *, status: str
    ) -> None:
        """Ends what is in flight and completes the parts: with the answers that there are."""
        await self._forget([*progress.calls.values()])
        state = await self._storage.run(batch.tenant, partial(_state, batch.tenant, batch.id))
        for number in state.missing:
            rows = [
                progress.rows.get(line.custom_id)
                or unanswered(
                    batch, line.custom_id, code=f"batch_{status}", message=MESSAGES[status]
                )
                for line in _part(lines, number)
            ]
            await self._storage.run(batch.tenant, partial(_write_part, batch, number, rows))

    async def _forget(self, calls: Sequence[LineCall]) -> None:
        """Ends calls and frees what the queue keeps of them."""
        for call in calls:
            if call.id is not None:
                with suppress(Unavailable):
                    await self._queue.forget(call.id)

    async def _end(self, batch: Batch, status: str, errors: Sequence[InputError] = ()) -> None:
        def write(tree: Tree) -> None:
            write_end(tree, batch, status=status, errors=errors)

        await self._storage.run(batch.tenant, write)


def _part(lines: Sequence[Line], number: int) -> Sequence[Line]:
    return lines[number * PART_LINES : (number + 1) * PART_LINES]


def _state(tenant: str, batch_id: str, tree: Tree) -> BatchState:
    return read_state(tree, tenant, batch_id)


def _write_total(batch: Batch, total: int, tree: Tree) -> None:
    write_total(tree, batch, total)


def _write_part(batch: Batch, number: int, rows: Sequence[Row], tree: Tree) -> None:
    write_part(tree, batch, number, rows)


def _checked(batch: Batch, tree: Tree, *, max_bytes: int) -> tuple[list[Line], list[LineError]]:
    return check(_blocks(batch, tree), endpoint=batch.endpoint, max_bytes=max_bytes)


def _blocks(batch: Batch, tree: Tree) -> Iterator[bytes]:
    """The input file; nothing if it was deleted, which is an error of the file then."""
    path = data_path(batch.tenant, batch.input_file)
    size = tree.size(path) or 0
    for start in range(0, size, BLOCK_BYTES):
        yield tree.read(path, start, min(size, start + BLOCK_BYTES)) or b""


def _bodies(batch: Batch, part: Sequence[Line], tree: Tree) -> list[bytes]:
    """The bodies of consecutive lines, in one read."""
    first = part[0].start
    data = tree.read(data_path(batch.tenant, batch.input_file), first, part[-1].end)
    if data is None:
        raise FileNotFoundError("the input file of a batch")
    lines = (data[line.start - first : line.end - first] for line in part)
    return [orjson.dumps(body_of(line)) for line in lines]
