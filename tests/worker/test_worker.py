"""The worker between a real queue and a real engine: whatever happens to an engine, the journal
holds exactly the answer that the request determines, and one end.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from model.batch import Batch
from service.engine.loop import EngineLoop
from service.engine.observer import Observer
from service.engine.plan import EngineConfig
from service.errors import Unavailable
from service.messages import (
    GENERATING,
    End,
    Event,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Submission,
    Tokens,
)
from service.prefixes import prompt_prefixes
from service.queues.contract import (
    CLEARED_AFTER,
    Claim,
    EngineInfo,
    Lease,
    QueueLimits,
    Write,
    WriteReply,
    WriteStatus,
)
from service.queues.memory.queue import MemoryQueue
from service.worker.observer import WorkerObserver
from service.worker.worker import EngineFailure, Worker
from tests.support.builders import at_length, slowly
from tests.support.fakes import (
    EOS_IDS,
    TOKEN_BYTES,
    OracleRunner,
    OverlappedOracle,
    oracle_answer,
    oracle_logprob,
)
from tests.support.waiting import PATIENCE, until

LEASE = 0.3
POISON = 90
WAIT = PATIENCE  # seconds for what has to happen


class Ledger(WorkerObserver):
    """A WorkerObserver that counts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def claimed(self, claim: Claim) -> None:
        self.counts["take_over" if claim.tokens else "claim"] += 1

    def first_token(self, request_id: str) -> None:
        self.counts["first_token"] += 1

    def ended(self, end: End, seconds: float) -> None:
        self.counts[f"end_{end.reason}"] += 1

    def released(self, claim: Claim, outcome: str, *, written: int, end: End | None = None) -> None:
        self.counts["released"] += 1

    def fenced(self) -> None:
        self.counts["fenced"] += 1

    def lease_lost(self, count: int) -> None:
        self.counts["lease_lost"] += count

    def wasted(self, tokens: int, cause: str) -> None:
        self.counts[f"wasted_{cause}"] += tokens

    def wrote(self, seconds: float) -> None:
        self.counts["writes"] += 1


class Station:
    """One engine with its worker, on a queue that it shares with others."""

    def __init__(
        self,
        queue: MemoryQueue,
        name: str,
        *,
        on_run: Callable[[Batch], None] | None = None,
        max_sequences: int = 8,
        journal_interval: float = 0.0,
        runner: type[OracleRunner] = OracleRunner,
    ) -> None:
        self.ledger = Ledger()
        self.engine = EngineLoop(
            runner(num_blocks=128, on_run=on_run),
            config=EngineConfig(max_batch_tokens=32, max_sequences=max_sequences),
            token_bytes=TOKEN_BYTES,
            eos_ids=EOS_IDS,
            deliver=self._deliver,
            observer=Observer(),
            on_failure=lambda _failure: self.worker.fail(),
            settle=self._settle,
        )
        self.worker = Worker(
            queue,
            self.engine,
            info=lambda: EngineInfo(
                id=name, numeric_class="oracle", version="0", features=GENERATING
            ),
            observer=self.ledger,
            journal_interval=journal_interval,
        )
        self.task: asyncio.Task[None] | None = None

    def _deliver(self, events: Sequence[Event]) -> None:
        self.worker.deliver(events)

    def _settle(self) -> bool:
        return self.worker.settle()

    def start(self) -> Station:
        self.task = asyncio.create_task(self.worker.run())
        return self

    async def drain(self) -> None:
        self.worker.drain()
        assert self.task is not None
        await self.task

    async def kill(self) -> None:
        """What SIGKILL leaves behind: leases that are neither renewed nor released."""
        self.worker._table.items.clear()
        self.engine.stop()
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class SharedQueue(MemoryQueue):
    """As one that other processes use, too."""

    shared = True


async def test_what_an_engine_holds_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it works and afterwards; so a second engine leaves a chat's next turn to it."""
    monkeypatch.setattr("service.worker.worker.ANNOUNCE_EVERY", 0.01)
    queue = SharedQueue(QueueLimits())
    station = Station(queue, "e").start()
    request = make_request("abcdefgh", max_tokens=20)
    await submit(queue, request)
    ids, _ = await answer(queue, request)
    prompt = [*request.prompt_ids, *ids]
    names = prompt_prefixes(prompt, tenant=request.tenant, numeric_class="oracle", block_size=4)

    def is_held() -> bool:
        held = queue._machine.affinity._held.get("e")
        return held is not None and names[0] in held[1]

    await until(is_held)
    await station.drain()


def make_queue(*, lease: float = LEASE) -> MemoryQueue:
    return MemoryQueue(QueueLimits(lease=lease))


def make_request(name: str, *, first: int = 1, max_tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(
        id=f"{name}.0",
        prompt_ids=(first, *(byte % 60 for byte in name.encode()[:8])),
        sampling=SamplingParams(seed=sum(name.encode()), temperature=0.8),
        max_tokens=max_tokens,
        ignore_eos=True,
    )


async def submit(queue: MemoryQueue, *requests: GenerationRequest) -> None:
    for request in requests:
        name = request.id.split(".")[0]
        await queue.submit(Submission(id=name, tenant=request.tenant, requests=(request,)))


async def answer(queue: MemoryQueue, request: GenerationRequest) -> tuple[list[int], End]:
    """The whole journal, checked: no hole, no overlap, one end."""
    ids: list[int] = []
    async with asyncio.timeout(PATIENCE):
        async for record in queue.follow(request.id):
            if isinstance(record, End):
                assert record.count == len(ids)
                assert [r for r in await queue.read(request.id) if isinstance(r, End)] == [record]
                return ids, record
            assert record.start == len(ids)
            ids += record.ids
    raise AssertionError("no end")


@asynccontextmanager
async def station(queue: MemoryQueue, name: str = "a", **options: object) -> AsyncIterator[Station]:
    made = Station(queue, name, **options).start()  # type: ignore[arg-type]  # options of Station
    try:
        yield made
    finally:
        if made.task is not None and not made.task.done():
            await made.drain()


def taking(seconds: float) -> Callable[[Batch], None]:
    """Steps that take a while, so that something can happen between two."""
    return lambda _batch: time.sleep(seconds)


async def test_journals_exactly_the_answers() -> None:
    queue = make_queue()
    requests = [make_request(f"r{index}") for index in range(20)]
    async with station(queue) as one:
        await submit(queue, *requests)
        for request in requests:
            ids, end = await answer(queue, request)
            assert ids == oracle_answer(request)
            assert end.reason is FinishReason.LENGTH
        assert one.worker.running == 0
        one.engine.check_integrity()
    depth = await queue.depth()
    assert (depth.queued_requests, depth.running_requests, depth.queued_tokens) == (0, 0, 0)


async def test_held_tokens_are_journalled_with_the_end_and_the_first_ones_at_once() -> None:
    """The interval never passes. The engine stands still after two steps until a reader has the
    first record; the remaining tokens come with the end, or if the writer is flushed.
    """
    queue, request = make_queue(lease=30), make_request("held", max_tokens=30)
    gates = {2: threading.Event(), 12: threading.Event()}
    steps = itertools.count()

    def wait_at_gates(_batch: Batch) -> None:
        if (gate := gates.get(next(steps))) is not None:
            assert gate.wait(WAIT)

    async def journalled() -> list[int]:
        return [len(r.ids) for r in await queue.read(request.id) if isinstance(r, Tokens)]

    async with station(queue, on_run=wait_at_gates, journal_interval=1e9) as one:
        await submit(queue, request)
        async with asyncio.timeout(WAIT):
            while not await journalled():
                await asyncio.sleep(0.005)
            gates[2].set()
            while sum(await journalled()) < 8:
                await asyncio.sleep(0.005)
                await one.worker._journal.flush()
            gates[12].set()
        assert (await answer(queue, request))[0] == oracle_answer(request)
        assert (await journalled())[-1] >= 12, "held to the end"


@pytest.mark.parametrize("seed", [1, *slowly(0, 2), *at_length(3, 4, 5)])
async def test_killed_engines_change_no_token(seed: int) -> None:
    """Engines die at random moments; the next ones continue at the end of the journal."""
    draw = random.Random(seed)
    queue = make_queue(lease=0.1)
    requests = [make_request(f"k{seed}x{index}", max_tokens=40) for index in range(3)]
    await submit(queue, *requests)
    for life in range(2):
        engine = Station(queue, f"e{life}", on_run=taking(0.002)).start()
        await asyncio.sleep(draw.uniform(0.01, 0.06))
        await engine.kill()
    async with station(queue, "last") as last:
        for request in requests:
            ids, _ = await answer(queue, request)
            assert ids == oracle_answer(request)
        assert last.ledger.counts["take_over"] + last.ledger.counts["claim"] >= 1


@pytest.mark.slow
async def test_a_killed_engine_loses_no_score() -> None:
    """It stands still after 20 steps, of 8 scores each at most, and is killed there."""
    queue = make_queue()
    requests = [
        replace(
            make_request(f"s{index}", max_tokens=num),
            scored=tuple((number % 50, number % 7) for number in range(num)),
            sampling=SamplingParams(seed=0, temperature=0.0, top_logprobs=0),
        )
        for index, num in enumerate((400, 3, 30))
    ]
    moves, steps = threading.Event(), itertools.count()

    def stand_still(_batch: Batch) -> None:
        if next(steps) == 20:
            assert moves.wait(WAIT)

    first = Station(queue, "first", on_run=stand_still).start()
    await submit(queue, *requests)
    async with asyncio.timeout(WAIT):
        while not await queue.read(requests[0].id):
            await asyncio.sleep(0.005)
    moves.set()
    await first.kill()
    async with station(queue, "last") as last:
        for request in requests:
            ids, end = await answer(queue, request)
            assert (ids, end.reason) == ([each[-1] for each in request.scored], FinishReason.LENGTH)
            found = [one for r in await queue.read(request.id) if isinstance(r, Tokens)
                     for one in r.logprobs]  # fmt: skip
            assert found == [
                oracle_logprob((*request.prompt_ids, *each[:-1]), each[-1], num_top=0)
                for each in request.scored
            ]
        assert last.ledger.counts["take_over"] >= 1


class WatchedQueue(MemoryQueue):
    """Keeps what was claimed of it."""

    def __init__(self, limits: QueueLimits) -> None:
        super().__init__(limits)
        self.claims: list[Claim] = []

    async def claim(self, *arguments: Any, **options: Any) -> Sequence[Claim]:
        claims = await super().claim(*arguments, **options)
        self.claims += claims
        return claims


async def test_a_drained_engine_hands_over_at_once_and_without_blame() -> None:
    queue = WatchedQueue(QueueLimits(lease=30))
    request = make_request("roll", max_tokens=50)
    await submit(queue, request)
    first = Station(queue, "first", on_run=taking(0.02)).start()
    while not await queue.read(request.id):
        await asyncio.sleep(0.005)
    await first.drain()
    assert not any(isinstance(record, End) for record in await queue.read(request.id))
    async with station(queue, "second") as second:
        ids, _ = await answer(queue, request)  # long before the lease would have been over
        assert second.ledger.counts["take_over"] == 1
    assert ids == oracle_answer(request)
    assert [claim.lease.epoch for claim in queue.claims] == [1, 2], "it took back what it gave back"


async def test_a_stopped_request_leaves_the_engine_and_gets_one_end() -> None:
    queue = make_queue()
    request, other = make_request("stopped", max_tokens=55), make_request("other", max_tokens=30)
    async with station(queue, on_run=taking(0.002)) as one:
        await submit(queue, request, other)
        while not await queue.read(request.id):
            await asyncio.sleep(0.002)
        await queue.stop([request.id], FinishReason.CANCELLED)
        ids, end = await answer(queue, request)
        assert end.reason is FinishReason.CANCELLED
        assert ids == oracle_answer(request)[: len(ids)]
        assert len(ids) < 55
        assert (await answer(queue, other))[0] == oracle_answer(other)
        assert one.ledger.counts["wasted_cancelled"] >= 1
        assert not one.engine.busy
        one.engine.check_integrity()


async def test_a_broken_runner_ends_the_worker_and_gives_everything_back() -> None:
    def breaks(_batch: Batch) -> None:
        raise RuntimeError("device lost")

    queue = make_queue(lease=30)
    request = make_request("broken")
    await submit(queue, request)
    failing = Station(queue, "bad", on_run=breaks).start()
    assert failing.task is not None
    with pytest.raises(EngineFailure):
        await failing.task
    async with station(queue, "good"):
        assert (await answer(queue, request))[0] == oracle_answer(request)


async def test_poison_is_failed_and_the_innocent_finish() -> None:
    """One request kills whatever runs it. At most three engines die, and only it is failed."""

    def die_of_poison(batch: Batch) -> None:
        if POISON in batch.tokens_T[batch.positions_T == 0]:
            raise RuntimeError("poison")

    queue = make_queue(lease=0.05)
    poison = make_request("poison", first=POISON)
    innocents = [make_request(f"i{index}", max_tokens=6) for index in range(31)]
    await submit(queue, *innocents[:15], poison, *innocents[15:])
    deaths = 0
    while True:
        engine = Station(queue, f"e{deaths}", on_run=die_of_poison, max_sequences=32)
        # A real crash releases nothing.
        engine.worker._give_back = no_farewell  # type: ignore[method-assign]
        engine.start()
        assert engine.task is not None
        while not engine.task.done() and await unfinished(queue):
            await asyncio.sleep(0.005)
        if not engine.task.done():
            await engine.kill()
            break
        with pytest.raises(EngineFailure):
            engine.task.result()
        deaths += 1
    answers = [await answer(queue, request) for request in [*innocents, poison]]
    assert deaths == 3
    assert [ids for ids, _ in answers[:-1]] == [oracle_answer(request) for request in innocents]
    assert (answers[-1][1].reason, answers[-1][1].error) == (
        FinishReason.ERROR,
        "engine_crash_loop",
    )


async def unfinished(queue: MemoryQueue) -> int:
    depth = await queue.depth()
    return depth.queued_requests + depth.running_requests


async def no_farewell() -> None:
    """The process is gone."""


class FlakyQueue(MemoryQueue):
    """A queue whose store is away now and then, and whose replies get lost."""

    def __init__(self, seed: int) -> None:
        super().__init__(QueueLimits(lease=5))
        self._draw = random.Random(seed)
        self._deck: list[str] = []
        self.faults: Counter[str] = Counter()

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        """Fails before or after the records are stored."""
        if not self._deck:
            self._deck = ["before", "after", "none", "none"]
            self._draw.shuffle(self._deck)
        fault = self._deck.pop()
        self.faults[fault] += 1
        if fault == "before":
            raise Unavailable("gone")
        replies = await super().write(writes)
        if fault == "after":
            raise Unavailable("reply lost")
        return replies


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_lost_replies_repeat_nothing(seed: int) -> None:
    queue = FlakyQueue(seed)
    requests = [make_request(f"f{seed}{index}", max_tokens=40) for index in range(4)]
    async with station(queue, on_run=taking(0.005)):
        await submit(queue, *requests)
        for request in requests:
            assert (await answer(queue, request))[0] == oracle_answer(request)
    assert queue.faults["before"]
    assert queue.faults["after"]


class ForgetfulQueue(MemoryQueue):
    """A store that loses the tail of a journal once, as one that was failed over does."""

    def __init__(self, keep: int) -> None:
        super().__init__(QueueLimits(lease=5))
        self.keep = keep
        self.gaps = 0
        self._runs = self._written = 0
        self._lost = False

    def keep_up(self, _batch: Batch) -> None:
        """The engine waits for its journal, so that no write has most of an answer."""
        self._runs += 1
        deadline = time.monotonic() + PATIENCE
        while not self._lost and self._written < self._runs - 2 and time.monotonic() < deadline:
            time.sleep(0.001)

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        """Drops all but `keep` tokens when there are some more."""
        entry = self._entries[writes[0].lease.request_id]
        if not self._lost and entry.count >= self.keep + 3:
            self._lost = True
            while entry.count > self.keep:
                entry.journal.pop()
        replies = await super().write(writes)
        self._written = entry.count
        self.gaps += sum(reply.status is WriteStatus.GAP for reply in replies)
        return replies


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 1, 5])
async def test_a_lost_tail_is_sent_again(keep: int) -> None:
    queue = ForgetfulQueue(keep)
    request = make_request("tail", max_tokens=30)
    async with station(queue, on_run=queue.keep_up):
        await submit(queue, request)
        while await unfinished(queue):
            await asyncio.sleep(0.01)
    records = await queue.read(request.id)
    ids = [token for record in records if isinstance(record, Tokens) for token in record.ids]
    assert queue.gaps >= 1
    assert ids == oracle_answer(request)


class PartlyAwayQueue(MemoryQueue):
    """A store one part of which, with the requests `x...`, is away or full."""

    def __init__(self, status: WriteStatus | None) -> None:
        super().__init__(QueueLimits(lease=5))
        self.status = status
        self.refused = 0

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        """Takes the ends of what is full."""
        there = [write for write in writes if not self._refuses(write)]
        replies = iter(await super().write(there))
        found = []
        for write in writes:
            if self.status is not None and self._refuses(write):
                found.append(WriteReply(self.status, 0))
            else:
                found.append(next(replies))
        self.refused += len(writes) - len(there)
        return found

    def _refuses(self, write: Write) -> bool:
        if self.status is None or not write.lease.request_id.startswith("x"):
            return False
        return self.status is WriteStatus.AWAY or isinstance(write.record, Tokens)


@pytest.mark.slow
async def test_a_part_of_the_store_that_is_away_delays_no_other() -> None:
    """What it holds is written in order when it is back."""
    queue = PartlyAwayQueue(WriteStatus.AWAY)
    away, there = make_request("x1", max_tokens=30), make_request("y1", max_tokens=30)
    async with station(queue, on_run=taking(0.002)) as one:
        await submit(queue, away, there)
        assert (await answer(queue, there))[0] == oracle_answer(there)
        await until(lambda: queue.refused > 30)
        assert list(await queue.read(away.id)) == []
        queue.status = None
        assert (await answer(queue, away))[0] == oracle_answer(away)
        await until(lambda: one.worker.running == 0)


@pytest.mark.slow
async def test_what_a_part_of_the_store_did_not_take_has_one_retry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every step tries again, too, and does not start a timer of its own."""
    far = 1e6
    monkeypatch.setattr("service.worker.journal.AGAIN", far)
    queue = PartlyAwayQueue(WriteStatus.AWAY)
    request = make_request("x1", max_tokens=30)
    async with station(queue, on_run=taking(0.002)):
        await submit(queue, request)
        await until(lambda: queue.refused > 30)
        loop: Any = asyncio.get_running_loop()
        timers = [timer for timer in loop._scheduled if timer.when() > loop.time() + far / 2]
        (retry,) = [timer for timer in timers if not timer.cancelled()]
        queue.status = None
        retry._run()
        assert (await answer(queue, request))[0] == oracle_answer(request)


@pytest.mark.slow
async def test_a_part_of_the_store_that_is_full_ends_its_requests_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.worker.journal.STORAGE_PATIENCE", 0.2)
    queue = PartlyAwayQueue(WriteStatus.STORAGE)
    full, there = make_request("x1", max_tokens=30), make_request("y1", max_tokens=30)
    async with station(queue, on_run=taking(0.02)):
        await submit(queue, full, there)
        ids, end = await answer(queue, full)
        assert (ids, end.reason, end.error) == ([], FinishReason.ERROR, "storage_full")
        assert (await answer(queue, there))[0] == oracle_answer(there)


class FullQueue(MemoryQueue):
    """A store with no room for tokens; ends fit."""

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        """Refuses whatever holds tokens."""
        if any(isinstance(write.record, Tokens) for write in writes):
            raise Unavailable("no room", code="storage_full")
        return await super().write(writes)


@pytest.mark.slow
async def test_a_full_store_ends_requests_instead_of_holding_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.worker.journal.STORAGE_PATIENCE", 0.2)
    queue = FullQueue(QueueLimits(lease=5))
    request = make_request("full")
    async with station(queue) as one:
        await submit(queue, request)
        ids, end = await answer(queue, request)
        assert (ids, end.reason, end.error) == ([], FinishReason.ERROR, "storage_full")
        assert one.worker.running == 0


@pytest.mark.slow
async def test_an_engine_that_cannot_renew_stops_computing() -> None:
    class Deaf(MemoryQueue):
        deaf = False

        async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
            """Does not answer."""
            if self.deaf:
                raise Unavailable("gone")
            return await super().renew(leases)

    queue = Deaf(QueueLimits(lease=0.2))
    request = make_request("deaf", max_tokens=20)
    async with station(queue, on_run=taking(0.05)) as one:
        await submit(queue, request)
        while not await queue.read(request.id):
            await asyncio.sleep(0.005)
        queue.deaf = True
        async with asyncio.timeout(PATIENCE):
            while not one.ledger.counts["lease_lost"]:
                await asyncio.sleep(0.01)
        queue.deaf = False
        assert (await answer(queue, request))[0] == oracle_answer(request)


class Away(MemoryQueue):
    """A store that goes away, and when it is back hears owners before it hands anything out."""

    away = False
    unheard = False
    attempts: tuple[int, ...] = ()

    async def renew(self, leases: Sequence[Lease]) -> Sequence[str]:
        """Does not answer while away."""
        if self.away:
            raise Unavailable("gone")
        return await super().renew(leases)

    async def release(self, leases: Sequence[Lease], *, died: bool = False) -> None:
        """After it claims are answered again."""
        await super().release(leases, died=died)
        self.unheard = False

    async def claim(self, *arguments: Any, **options: Any) -> Sequence[Claim]:
        """Notes the attempts."""
        if self.unheard:
            raise Unavailable("gone")
        claims = await super().claim(*arguments, **options)
        self.attempts += tuple(claim.attempt for claim in claims)
        return claims


@pytest.mark.slow
async def test_an_outage_longer_than_a_lease_blames_nobody() -> None:
    """Else three of them would end every answer that lives through them."""
    queue = Away(QueueLimits(lease=0.6))
    request = make_request("away", max_tokens=30)
    async with station(queue, on_run=taking(0.05)) as one:
        await submit(queue, request)
        while not await queue.read(request.id):
            await asyncio.sleep(0.005)
        queue.away = queue.unheard = True
        async with asyncio.timeout(PATIENCE):
            while not one.ledger.counts["lease_lost"]:
                await asyncio.sleep(0.01)
        queue.away = False
        assert (await answer(queue, request))[0] == oracle_answer(request)
    assert queue.attempts == (1, 1)


async def blamed(queue: MemoryQueue, request: GenerationRequest, *, deaths: int) -> None:
    """Engines die on a request before its first token."""
    await submit(queue, request)
    for death in range(deaths):
        info = EngineInfo(id=f"dead{death}", numeric_class="oracle", version="0")
        (claim,) = await queue.claim(info, limit=1, wait=1)
        await queue.release([claim.lease], died=True)


class SlowQueue(MemoryQueue):
    """Each write takes longer than a step."""

    async def write(self, writes: Sequence[Write]) -> Sequence[WriteReply]:
        await asyncio.sleep(0.02)
        return await super().write(writes)


@pytest.mark.parametrize("runner", [OracleRunner, OverlappedOracle], ids=["", "overlapped"])
async def test_an_isolated_request_s_tokens_are_journalled_before_the_next_step(
    runner: type[OracleRunner],
) -> None:
    """Else the position at which an engine dies would be known only roughly."""
    queue = SlowQueue(QueueLimits(lease=5))
    request = make_request("isolated", max_tokens=20)
    await blamed(queue, request, deaths=1)
    lags: list[tuple[int, int]] = []

    def note(batch: Batch) -> None:
        (index,) = batch.sampling.indices_R.tolist()
        lags.append((index, index - queue._entries[request.id].count))

    async with station(queue, on_run=note, runner=runner):
        assert (await answer(queue, request))[0] == oracle_answer(request)
    assert [lag for index, lag in lags if index <= CLEARED_AFTER] == [0] * (CLEARED_AFTER + 1)
    assert max(lag for _, lag in lags) > 0, "later steps do not wait"


async def test_nothing_new_runs_beside_a_last_attempt_until_it_is_cleared() -> None:
    queue = WatchedQueue(QueueLimits(lease=5))
    request, other = make_request("last", max_tokens=40), make_request("other")
    await blamed(queue, request, deaths=2)
    queue.claims.clear()
    begun: list[int] = []
    async with station(queue, on_run=taking(0.005)):
        while not queue.claims:
            await asyncio.sleep(0.001)
        await submit(queue, other)
        while len(queue.claims) < 2:
            await asyncio.sleep(0.001)
        begun.append(queue._entries[request.id].count)
        assert (await answer(queue, other))[0] == oracle_answer(other)
        assert (await answer(queue, request))[0] == oracle_answer(request)
    assert queue.claims[0].attempt == queue.limits.max_attempts
    assert CLEARED_AFTER < begun[0] < 40


def is_stalled(engine: Station) -> bool:
    return engine.worker.is_stalled


@pytest.mark.slow
async def test_a_stalled_engine_gives_its_requests_up_and_may_come_back() -> None:
    """Its event loop lives on. When the step ends after all, the blame is revoked."""
    queue = WatchedQueue(QueueLimits(lease=0.3))
    request = make_request("stall", max_tokens=30)
    stuck, go_on = threading.Event(), threading.Event()

    def hang(_batch: Batch) -> None:
        if queue._entries[request.id].count >= 3 and not stuck.is_set():
            stuck.set()
            go_on.wait(WAIT)

    await submit(queue, request)
    async with station(queue, "stalled", on_run=hang) as stalled:
        await asyncio.to_thread(stuck.wait, WAIT)
        async with station(queue, "other", on_run=taking(0.002)) as other:
            assert (await answer(queue, request))[0] == oracle_answer(request)
            assert is_stalled(stalled)
            assert stalled.worker.running == 0
            assert other.ledger.counts["take_over"] == 1
        assert queue.claims[-1].attempt == 2
        go_on.set()
        after = make_request("after")
        await submit(queue, after)
        assert (await answer(queue, after))[0] == oracle_answer(after)
        assert not is_stalled(stalled)
        while stalled.engine.busy:
            await asyncio.sleep(0.005)
        stalled.engine.check_integrity()
