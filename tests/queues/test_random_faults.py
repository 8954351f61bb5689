"""A random walk over the whole state machine, with everything that goes wrong in a cluster.

Engines are killed, paused (and come back as zombies with stale leases), lose replies and are late;
requests are cancelled, run out of time and are handed over. Token i of a request is a hash of
(request, i), so a single token shows loss, repetition and exchange; zombies with a stale lease
write wrong tokens on purpose. Redis's clock is the walk's, too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest

from service.messages import Allowance, End, FinishReason, Submission
from service.queues.contract import Claim, Lease, Queue, QueueDepth, QueueLimits, Write, WriteStatus
from service.queues.memory.queue import MemoryQueue
from service.queues.redis.queue import RedisQueue
from tests.cluster.redis_process import RedisServer
from tests.queues.builders import (
    answer_of,
    count_stored,
    ids_of,
    make_engine,
    make_submission,
    make_tokens,
    oracle,
    stop_at,
)
from tests.support.builders import at_length

KEY = Allowance(key="k", requests_per_minute=10**6, tokens_per_minute=10**8, max_in_flight=400)
LIMITS = QueueLimits(
    max_requests=400, max_tokens=10**6, max_per_tenant=400, lease=0.03, max_attempts=6
)


@dataclass(slots=True)
class Held:
    """What an engine believes of a request that it runs."""

    lease: Lease
    count: int


@dataclass
class Walk:
    """One walk; `happened` counts what it met."""

    queue: Queue
    rng: random.Random
    engines: list[dict[str, Held]] = field(default_factory=lambda: [{} for _ in range(3)])
    zombies: list[Held] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)  # of the last claim
    happened: Counter[str] = field(default_factory=Counter)
    submissions: list[Submission] = field(default_factory=list)
    forgotten: set[str] = field(default_factory=set)

    async def submit(self, engine: dict[str, Held]) -> None:
        timeout_ms = self.rng.choice([60_000] * 9 + [20])
        submission = make_submission(
            self.rng.choice((1, 1, 2)),
            tenant=self.rng.choice("ab"),
            allowance=self.rng.choice((None, KEY)),
            priority=self.rng.randrange(3),
            timeout_ms=timeout_ms,
            grace=self.rng.choice((None, None, None, 0.05)),
            keep=self.rng.choice((None, 0.1, 900.0)),
            sent="x" * self.rng.randrange(100),
            key=self.rng.choice((None, None, f"k{self.rng.randrange(20)}")),
            fingerprint=str(self.rng.random()),
        )
        self.submissions.append(submission)
        reply = await self.queue.submit(submission)
        if submission.idempotency_key is not None and reply.status == "conflict":
            return
        assert reply.status == "ok"
        again = await self.queue.submit(submission)  # the reply was lost
        assert again.status == "exists"
        for request in submission.requests:
            self.lengths[request.id] = self.rng.randint(0, 12)

    async def claim(self, engine: dict[str, Held]) -> None:
        name = f"e{self.engines.index(engine)}" if engine in self.engines else "e"
        wanted = self.rng.randint(1, 3)
        for claim in await self.queue.claim(make_engine(name), limit=wanted, wait=0):
            self.check(claim)
            if self.rng.random() < 0.08:
                self.happened["died after claim"] += 1
                continue
            engine[claim.request.id] = Held(claim.lease, len(claim.tokens))

    def check(self, claim: Claim) -> None:
        rid = claim.request.id
        self.happened["claim" if claim.attempt == 1 else "claim after a death"] += 1
        assert list(claim.tokens) == [oracle(rid, i) for i in range(len(claim.tokens))]
        assert claim.lease.epoch > self.epochs.get(rid, 0)
        self.epochs[rid] = claim.lease.epoch

    async def kill(self, engine: dict[str, Held]) -> None:
        self.happened["kill"] += bool(engine)
        engine.clear()

    async def pause(self, engine: dict[str, Held]) -> None:
        self.happened["pause"] += bool(engine)
        self.zombies += engine.values()
        engine.clear()

    async def wake_zombie(self, engine: dict[str, Held]) -> None:
        if not self.zombies:
            return
        held = self.zombies.pop(self.rng.randrange(len(self.zombies)))
        rid, count = held.lease.request_id, held.count
        if held.lease.epoch < self.epochs[rid]:
            wrong = make_tokens([99_999], start=count)
            writes = [Write(held.lease, wrong), Write(held.lease, stop_at(count))]
            replies = await self.queue.write(writes)
            assert all(reply.status is WriteStatus.FENCED for reply in replies)
            assert list(await self.queue.renew([held.lease])) == [rid]
            self.happened["stale write"] += 2
        elif count < self.lengths[rid]:
            await self.queue.write([Write(held.lease, answer_of(rid, count, count + 1))])
            self.happened["late write"] += 1

    async def cancel(self, engine: dict[str, Held]) -> None:
        if self.lengths:
            rid = self.rng.choice([*self.lengths])
            await self.queue.stop([rid], FinishReason.CANCELLED)

    async def sweep(self, engine: dict[str, Held]) -> None:
        self.happened["deadline"] += await self.queue.sweep()

    async def renew(self, engine: dict[str, Held]) -> None:
        for rid in await self.queue.renew([held.lease for held in engine.values()]):
            del engine[rid]
            self.happened["lost lease"] += 1

    async def release(self, engine: dict[str, Held]) -> None:
        if engine:
            held = engine.pop(self.rng.choice([*engine]))
            await self.queue.release([held.lease])
            self.happened["release"] += 1

    async def step(self, engine: dict[str, Held]) -> None:
        """An engine step: a few tokens for some, the end if there are no more."""
        chosen = [rid for rid in engine if self.rng.random() < 0.7]
        writes: list[Write] = []
        for rid in chosen:
            held, length = engine[rid], self.lengths[rid]
            until = min(length, held.count + self.rng.randint(1, 3))
            if until > held.count:
                writes.append(Write(held.lease, answer_of(rid, held.count, until)))
            if until == length and self.rng.random() < 0.8:
                writes.append(Write(held.lease, stop_at(length)))
        times = 2 if self.rng.random() < 0.2 else 1  # the first reply was lost
        for _ in range(times):
            replies = await self.queue.write(writes)
        for write, reply in zip(writes, replies, strict=True):
            rid, record = write.lease.request_id, write.record
            self.happened[reply.status] += 1
            assert reply.status is not WriteStatus.GAP
            if rid in engine and reply.status is not WriteStatus.FENCED:
                engine[rid].count = reply.count
            if isinstance(record, End) or reply.status is WriteStatus.FENCED:
                engine.pop(rid, None)

    async def forget(self, engine: dict[str, Held]) -> None:
        if not self.submissions:
            return
        submission = self.rng.choice(self.submissions)
        await self.queue.forget(submission.id)
        self.forgotten |= {request.id for request in submission.requests}
        self.happened["forgotten"] += 1

    async def recount(self) -> None:
        """At any time the queue's counters are what can be counted again."""
        counted, again = await count_stored(self.queue, self.submissions)
        assert counted == again

    async def run(self, operations: int, *, passes: Callable[[float], Awaitable[None]]) -> None:
        walk = (
            (self.submit, 8), (self.claim, 16), (self.kill, 2), (self.pause, 2),
            (self.wake_zombie, 4), (self.cancel, 3), (self.sweep, 3), (self.renew, 8),
            (self.release, 2), (self.step, 40), (self.forget, 1),
        )  # fmt: skip
        calm = tuple(pair for pair in walk if pair[0] not in {self.submit, self.kill, self.pause})
        for done in range(20 * operations):
            if done >= operations and not await self.live():
                return
            acts, weights = zip(*(walk if done < operations else calm), strict=True)
            (act,) = self.rng.choices(acts, weights)
            await act(self.rng.choice(self.engines))
            if self.rng.random() < 0.02:
                await self.recount()
            if self.rng.random() < 0.05:
                await passes(LIMITS.lease * self.rng.choice((0.3, 1.2)))
        raise AssertionError("no progress")

    async def live(self) -> bool:
        depth = await self.queue.depth()
        return bool(depth.queued_requests + depth.running_requests)

    async def verify(self) -> None:
        """No token lost, repeated or wrong, one end each, and nothing counted any more."""
        for rid, length in self.lengths.items():
            if rid in self.forgotten:
                continue
            *records, end = await self.queue.read(rid)
            ids = ids_of(records)
            assert not any(isinstance(record, End) for record in records)
            assert ids == [oracle(rid, i) for i in range(len(ids))]
            assert isinstance(end, End)
            assert end.count == len(ids)
            assert end.reason is not FinishReason.STOP or end.count == length
            self.happened[f"ended: {end.reason}"] += 1
        await self.recount()
        nothing = QueueDepth(queued_requests=0, queued_tokens=0, running_requests=0)
        assert await self.queue.depth() == nothing
        expected = ("kill", "pause", "stale write", "claim after a death", "dup", "ended: stop")
        assert all(self.happened[name] for name in expected), self.happened


@pytest.mark.parametrize("seed", range(4))
async def test_random_faults_in_memory(seed: int) -> None:
    now = 0.0

    async def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    queue = MemoryQueue(LIMITS, clock=lambda: now)
    walk = Walk(queue, random.Random(seed))
    await walk.run(2000, passes=passes)
    await walk.verify()
    await passes(max(LIMITS.resume_window, LIMITS.idempotency_ttl) + 60)
    await queue.sweep()
    assert not len(queue._machine.tenants)
    assert not len(queue._submissions)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *at_length(1, 2, 3)])
async def test_random_faults_in_redis(
    seed: int,
    redis_server: RedisServer,
    redis_queues: Callable[[str, QueueLimits], RedisQueue],
) -> None:
    async def passes(seconds: float) -> None:
        redis_server.advance(seconds)

    queue = redis_queues(redis_server.url, replace(LIMITS, resume_window=300.0))
    walk = Walk(queue, random.Random(seed))
    await walk.run(2000, passes=passes)
    await walk.verify()
    assert not await queue.claim(make_engine(), limit=100, wait=0)  # drops what was cancelled
    prefix = "quire:2:{s0}:"
    assert redis_server.ask("ZCARD", prefix + "since") == ":0"
    for priority in range(3):
        assert redis_server.ask("ZCARD", f"{prefix}w{priority}") == ":0"
        assert redis_server.ask("XLEN", f"{prefix}q{priority}") == ":0"
        assert redis_server.ask("XPENDING", f"{prefix}q{priority}", "engines", "-", "+", 9) == "*0"
    assert redis_server.ask("ZCARD", prefix + "dl") == ":0"
    assert redis_server.ask("EXISTS", prefix + "adm") == ":0"
