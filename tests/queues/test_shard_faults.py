"""One primary of a queue of several is killed while answers run: every one is whole and right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from service.errors import Unavailable
from service.messages import End, FinishReason, Record
from service.queues.contract import Claim, Lease, Queue, SubmitStatus, Write, WriteStatus
from service.queues.redis.keys import shard_of
from service.queues.redis.sharded import ShardedQueue, open_redis
from tests.cluster.redis_process import RedisServer, valkey
from tests.cluster.redis_sets import Cluster, Independent, SentinelSet
from tests.queues.builders import (
    answer_of,
    append,
    ids_of,
    make_engine,
    make_submission,
    oracle,
    stop_at,
)
from tests.queues.contract import LIMITS
from tests.support.waiting import PATIENCE, available, until

pytestmark = pytest.mark.slow

LONG = replace(
    LIMITS, lease=30.0, resume_window=600.0, max_requests=100, max_tokens=10_000, max_per_tenant=100
)
LENGTH = 40
HELD_AT = 10
"""Tokens of each answer until the test lets it go on: what is killed then is at work."""
REQUESTS = 12


class Engine:
    """Answers requests, a token at a time; repeats what the store did not take."""

    def __init__(self, queue: Queue, name: str, *, go: asyncio.Event) -> None:
        self._queue = queue
        self._info = make_engine(name)
        self._go = go
        self._leases: dict[str, Lease] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew())
            while True:
                try:
                    claims = await self._queue.claim(self._info, limit=4, wait=0.2)
                except Unavailable:
                    await asyncio.sleep(0.02)
                    continue
                for claim in claims:
                    self._leases[claim.request.id] = claim.lease
                    group.create_task(self._answer(claim))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            with suppress(Unavailable):
                await self._queue.renew(list(self._leases.values()))

    async def _answer(self, claim: Claim) -> None:
        rid, count = claim.request.id, len(claim.tokens)
        while True:
            record: Record = (
                stop_at(LENGTH) if count == LENGTH else answer_of(rid, count, count + 1)
            )
            await asyncio.sleep(0.01)
            if count >= HELD_AT:
                await self._go.wait()
            try:
                reply = await append(self._queue, claim.lease, record)
            except Unavailable:
                continue
            if reply.status is WriteStatus.FENCED:
                break
            if reply.status is WriteStatus.GAP:
                count = reply.count
            elif reply.status in {WriteStatus.OK, WriteStatus.DUP}:
                if isinstance(record, End):
                    break
                count += 1
        self._leases.pop(rid, None)


class Answers:
    """What readers got, by request. Engines go on after `HELD_AT` tokens if `go` is set."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.go = asyncio.Event()
        self.records: dict[str, list[Record]] = {}

    async def ask(self, slot: int) -> None:
        submission = make_submission(max_tokens=LENGTH, prompt_ids=(slot,))
        submission = make_submission(identifier=submission.id[:-4] + f"{slot:04x}")
        reply = await available(lambda: self._queue.submit(submission))
        assert reply.status in {SubmitStatus.OK, SubmitStatus.EXISTS}
        rid = submission.requests[0].id
        self.records[rid] = []
        async for record in self._queue.follow(rid):
            self.records[rid].append(record)

    def all_have(self, count: int, *, shards: set[int]) -> bool:
        """Whether each answer in these shards has so many records."""
        of_shards = [
            records for rid, records in self.records.items() if shard_of(rid, shards=3) in shards
        ]
        return len(of_shards) == len(shards) * REQUESTS // 3 and all(
            len(records) >= count for records in of_shards
        )

    def check(self) -> None:
        for rid, records in self.records.items():
            assert ids_of(records) == [oracle(rid, i) for i in range(LENGTH)]
            assert [r.reason for r in records if isinstance(r, End)] == [FinishReason.STOP]


@asynccontextmanager
async def answering(url: str) -> AsyncIterator[tuple[Answers, list[asyncio.Task[None]]]]:
    """Two engines, and readers of `REQUESTS` answers, each with a queue of its own."""
    queues = [open_redis(url, LONG) for _ in range(3)]
    answers = Answers(queues[0])
    engines = [
        asyncio.create_task(Engine(queue, f"e{i}", go=answers.go).run())
        for i, queue in enumerate(queues[1:])
    ]
    readers = [asyncio.create_task(answers.ask(slot)) for slot in range(REQUESTS)]
    try:
        yield answers, readers
        assert not any(engine.done() for engine in engines)
    finally:
        for task in (*engines, *readers):
            task.cancel()
        await asyncio.gather(*engines, *readers, return_exceptions=True)
        for queue in queues:
            await queue.close()


async def finished(readers: list[asyncio.Task[None]]) -> None:
    async with asyncio.timeout(2 * PATIENCE):
        await asyncio.gather(*readers)


# --- independent servers --------------------------------------------------------------------
@pytest.fixture
def independent(tmp_path: Path) -> Iterator[Independent]:
    servers = Independent(tmp_path)
    try:
        servers.start()
        yield servers
    finally:
        servers.close()


async def test_what_a_dead_server_does_not_hold_goes_on(independent: Independent) -> None:
    """And the rest when it is back."""
    async with answering(independent.url) as (answers, readers):
        await until(lambda: answers.all_have(3, shards={0, 1, 2}))
        independent.servers[0].kill()
        answers.go.set()
        await until(lambda: answers.all_have(LENGTH + 1, shards={1, 2}))
        await asyncio.to_thread(independent.servers[0].start)
        await finished(readers)
        answers.check()


async def test_calls_about_a_dead_server_fail_and_others_do_not(
    independent: Independent, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = open_redis(independent.url, LONG)
    assert isinstance(queue, ShardedQueue)
    try:
        submissions = [make_submission(identifier=f"s0-{i:032x}") for i in range(3)]
        for each in submissions:
            await queue.submit(each)
        claims: dict[str, Claim] = {}
        while len(claims) < 3:
            found = await queue.claim(make_engine(), limit=3, wait=1.0)
            claims |= {claim.request.id: claim for claim in found}
        independent.servers[1].kill()
        leases = [claims[each.requests[0].id].lease for each in submissions]
        writes = [Write(lease, answer_of(lease.request_id, 0, 1)) for lease in leases]
        got = [reply.status for reply in await queue.write(writes)]
        assert got == [WriteStatus.OK, WriteStatus.AWAY, WriteStatus.OK]
        assert await queue.renew(leases) == []
        monkeypatch.setattr(queue, "limits", replace(LONG, lease=0.0))
        assert await queue.renew(leases) == [leases[1].request_id]
        for slot, fails in ((0, False), (1, True), (2, False)):
            submission = make_submission(identifier=f"s0-{99:028x}{slot:04x}")
            if fails:
                with pytest.raises(Unavailable) as caught:
                    await queue.submit(submission)
                assert caught.value.retry_after
            else:
                assert (await queue.submit(submission)).status is SubmitStatus.OK
        await queue.check()
        assert (await queue.depth()).queued_requests == 2
        await asyncio.to_thread(independent.servers[1].start)
        again = await available(lambda: queue.submit(make_submission(identifier=submissions[1].id)))
        assert again.status is SubmitStatus.EXISTS
        async with asyncio.timeout(PATIENCE):
            while (await queue.write(writes[1:2]))[0].status is WriteStatus.AWAY:
                await asyncio.sleep(0.01)
        assert list(await queue.read(leases[1].request_id)) == [writes[1].record]
    finally:
        await queue.close()


# --- failovers ------------------------------------------------------------------------------
@pytest.mark.longer
@pytest.mark.parametrize("program", ["redis", "valkey"])
async def test_a_cluster_whose_primary_dies_loses_nothing(program: str, tmp_path: Path) -> None:
    name = valkey() if program == "valkey" else "redis-server"
    cluster = Cluster(tmp_path, replicas=1, program=name)
    try:
        await asyncio.to_thread(cluster.start)
        async with answering(f"{cluster.url}?wait=1") as (answers, readers):
            await until(lambda: answers.all_have(3, shards={0, 1, 2}))
            cluster.servers[0].kill()
            answers.go.set()
            await finished(readers)
            answers.check()
    finally:
        cluster.close()


@pytest.mark.longer
@pytest.mark.parametrize("program", ["redis", "valkey"])
async def test_a_sentinel_set_whose_primary_dies_loses_nothing(
    program: str, tmp_path: Path
) -> None:
    name = valkey() if program == "valkey" else "redis-server"
    servers = SentinelSet(tmp_path, program=name)
    try:
        await asyncio.to_thread(servers.start)
        async with answering(f"{servers.url}?wait=1") as (answers, readers):
            await until(
                lambda: (
                    len(answers.records) == REQUESTS
                    and all(len(records) >= 3 for records in answers.records.values())
                )
            )
            servers.primary.kill()
            answers.go.set()
            await finished(readers)
            answers.check()
    finally:
        servers.close()


# --- waiting for a replica --------------------------------------------------------------------
async def test_a_submission_waits_for_a_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one it fails, and is admitted once when it is sent again; ends do not fail."""
    monkeypatch.setattr("service.queues.redis.queue.REPLICA_TIMEOUT", 0.2)
    primary, replica = (RedisServer(tmp_path / name) for name in ("primary", "replica"))
    queue = open_redis(f"{primary.url}?wait=1", LONG)
    try:
        primary.start()
        submission = make_submission()
        with pytest.raises(Unavailable, match="acknowledged"):
            await queue.submit(submission)
        claims = await queue.claim(make_engine(), limit=1, wait=0)
        assert len(claims) == 1, "it is there, but could be lost"
        assert (await append(queue, claims[0].lease, stop_at(0))).status is WriteStatus.OK
        replica.start()
        replica.ask("REPLICAOF", "127.0.0.1", primary.port)
        again = await available(lambda: queue.submit(submission))
        assert again.status is SubmitStatus.EXISTS
        other = make_submission()
        assert (await available(lambda: queue.submit(other))).submission_id == other.id
        await until(lambda: replica.ask("EXISTS", f"quire:2:{{s0}}:s:{other.id}") == ":1")
    finally:
        await queue.close()
        primary.close()
        replica.close()
