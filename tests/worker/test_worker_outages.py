"""A store that fails: whichever call it is, the process survives and the answers are exact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest

from service.api.http.call import Readers
from service.app import sweep_forever
from service.cluster import Cluster
from service.errors import Unavailable
from service.messages import End, FinishReason, GenerationRequest, ModelCard
from service.queues.contract import QueueLimits
from service.queues.memory.queue import MemoryQueue
from tests.support.fakes import oracle_answer
from tests.support.waiting import PATIENCE, available
from tests.worker.test_worker import Station, make_request, submit, taking, unfinished

METHODS = (
    "submit", "lookup", "read", "stop", "heartbeat", "forget", "sweep", "depth", "engines", "check",
    "claim", "write", "renew", "release",
)  # fmt: skip


class FailingQueue(MemoryQueue):
    """Asks `fault` before each call: "before" and "after" the call it raises, "" it does not."""

    def __init__(self, limits: QueueLimits) -> None:
        super().__init__(limits)
        self.calls: list[str] = []
        self.failed: list[str] = []
        self.fault: Callable[[int], str] = lambda _number: ""

    def _begin(self, name: str) -> str:
        self.calls.append(name)
        fault = self.fault(len(self.calls))
        if fault:
            self.failed.append(name)
        if fault == "before":
            raise Unavailable("gone", code="backend_unavailable")
        return fault

    async def stops(self) -> AsyncIterator[str]:
        """Fails when it is begun."""
        self._begin("stops")
        async for request_id in super().stops():
            yield request_id


def _failing(name: str) -> Callable[..., Any]:
    method = getattr(MemoryQueue, name)

    async def call(queue: FailingQueue, *arguments: Any, **options: Any) -> Any:
        fault = queue._begin(name)
        reply = await method(queue, *arguments, **options)
        if fault == "after":
            raise Unavailable("reply lost", code="backend_unavailable")
        return reply

    return call


for _name in METHODS:
    setattr(FailingQueue, _name, _failing(_name))


class Counters:
    """What a cluster observes."""

    def __init__(self) -> None:
        self.read = 0

    def queue_read(self, *_: object) -> None:
        self.read += 1

    def queue_away(self) -> None:
        """Nothing to note."""

    def serves(self, card: ModelCard) -> None:
        """Nothing to note."""


async def journal(queue: MemoryQueue, request: GenerationRequest) -> tuple[list[int], End]:
    """The whole answer, once it has ended."""
    async with asyncio.timeout(PATIENCE):
        while not (records := await available(lambda: queue.read(request.id))) or not isinstance(
            records[-1], End
        ):
            await asyncio.sleep(0.01)
    *tokens, end = records
    return [token for record in tokens for token in record.ids], end


async def run(queue: FailingQueue, *, drain: bool, pace: float = 0.002) -> None:
    """Two engines, one of which is drained, and a replica's background work; all of it survives."""
    requests = [make_request(f"o{index}", max_tokens=25) for index in range(3)]
    cancelled = make_request("cancelled", max_tokens=40)
    one = Station(queue, "one", on_run=taking(pace)).start()
    other = Station(queue, "other", on_run=taking(pace)).start()
    readers, seen = Readers(queue), Counters()
    card = ModelCard(id="m", max_model_len=64, vocab_size=97, numeric_class="oracle", created=0)
    chores = [
        asyncio.create_task(sweep_forever(queue, interval=0.02)),
        asyncio.create_task(readers.send_heartbeats(0.02)),
        asyncio.create_task(Cluster(queue, [card], observer=seen).watch()),
    ]
    readers.add("o0")
    try:
        for request in (*requests, cancelled):
            await available(partial(submit, queue, request))
        await available(lambda: queue.stop([cancelled.id], FinishReason.CANCELLED))
        if drain:
            await one.drain()
        for request in requests:
            ids, end = await journal(queue, request)
            assert (ids, end.reason) == (oracle_answer(request), FinishReason.LENGTH)
        ids, end = await journal(queue, cancelled)
        assert ids == oracle_answer(cancelled)[: len(ids)]
        assert await available(lambda: unfinished(queue)) == 0
        assert not any(chore.done() for chore in chores), "a background loop ended"
        if not drain:
            await one.drain()
        await other.drain()
    finally:
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)


async def calls_of_a_run() -> int:
    queue = FailingQueue(QueueLimits(lease=0.3))
    await run(queue, drain=True)
    assert {"submit", "claim", "write", "release", "sweep", "heartbeat", "engines"} <= {
        *queue.calls
    }
    return len(queue.calls)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", ["before", "after"])
async def test_any_one_call_may_fail(fault: str) -> None:
    """Call 1, call 2, ... to the last: one run each. They mostly wait, so several run at once."""
    failed: set[str] = set()
    places = asyncio.Semaphore(6)

    async def run_with_fault_at(number: int) -> None:
        queue = FailingQueue(QueueLimits(lease=0.3))
        queue.fault = lambda count: fault if count == number else ""
        async with places:
            await run(queue, drain=bool(number % 2))
        assert len(queue.failed) == 1
        failed.update(queue.failed)

    async with asyncio.TaskGroup() as group:
        for number in range(1, min(60, await calls_of_a_run()) + 1):
            group.create_task(run_with_fault_at(number))
    assert {"claim", "write", "submit"} <= failed


@pytest.mark.slow
@pytest.mark.parametrize("method", ["claim", "write", "renew", "release", "stops", "sweep"])
async def test_every_method_may_fail_the_first_three_times(method: str) -> None:
    """Those that come late in a run, too."""
    queue = FailingQueue(QueueLimits(lease=0.3))
    queue.fault = lambda _: (
        "before" if queue.calls.count(method) <= 3 and queue.calls[-1] == method else ""
    )
    await run(queue, drain=True, pace=0.03)
    assert queue.failed == [method] * len(queue.failed)
    assert queue.failed


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 12, 25, 40])
async def test_all_calls_may_fail_for_two_seconds(number: int) -> None:
    """Several leases long."""
    queue = FailingQueue(QueueLimits(lease=0.3))
    loop = asyncio.get_running_loop()
    began: list[float] = []

    def fault(count: int) -> str:
        if count == number:
            began.append(loop.time())
        return "before" if began and loop.time() - began[0] < 2 else ""

    queue.fault = fault
    await run(queue, drain=bool(number % 2))
    assert {"claim", "sweep"} <= {*queue.failed}


@pytest.mark.slow
async def test_a_release_that_fails_is_repeated() -> None:
    """After the store lost tokens of an earlier engine, which the present one cannot send again."""
    queue = FailingQueue(QueueLimits(lease=1.0))
    request = make_request("lost", max_tokens=50)
    await submit(queue, request)

    async def tokens(number: int) -> None:
        while queue._entries[request.id].count < number:
            await asyncio.sleep(0.005)

    first = Station(queue, "first", on_run=taking(0.01)).start()
    await tokens(6)
    await first.drain()
    second = Station(queue, "second", on_run=taking(0.01)).start()
    entry = queue._entries[request.id]
    await tokens(entry.count + 3)
    queue.fault = lambda _: (
        "before" if queue.calls[-1] == "release" and "release" not in queue.failed else ""
    )
    while entry.count > 2:
        entry.journal.pop()
    ids, end = await journal(queue, request)
    assert (ids, end.reason) == (oracle_answer(request), FinishReason.LENGTH)
    assert queue.failed == ["release"]
    await second.drain()
