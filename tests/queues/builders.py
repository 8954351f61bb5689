"""Builders with defaults for the queue tests, and an engine that computes nothing."""

from __future__ import annotations

import itertools
import random
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from service.messages import (
    Allowance,
    End,
    FinishReason,
    GenerationRequest,
    Record,
    SamplingParams,
    Submission,
    Tokens,
    child_ids,
    rolling_digest,
)
from service.queues.admission import (
    base_bytes,
    idempotency_bytes,
    kept_bytes,
    request_bytes,
    token_bytes,
)
from service.queues.contract import (
    Claim,
    EngineInfo,
    Lease,
    Queue,
    Write,
    WriteReply,
    WriteStatus,
    slot_of,
)
from service.queues.memory.queue import MemoryQueue
from service.queues.observer import QueueEvent, QueueObserver
from service.queues.redis.keys import shard_of
from service.queues.redis.queue import RedisQueue
from service.queues.redis.sharded import ShardedQueue
from tests.support.waiting import PATIENCE


class Counts(Counter[QueueEvent], QueueObserver):
    """An observer that remembers."""

    def happened(self, event: QueueEvent, count: int = 1) -> None:
        self[event] += count


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that gets no CPU for seconds is no outage; and each claim looks for orphans."""
    for name in ("CONNECT_TIMEOUT", "REPLY_TIMEOUT"):
        monkeypatch.setattr(f"service.queues.redis.servers.{name}", PATIENCE)
    monkeypatch.setattr("service.queues.redis.claims.ORPHANS_EVERY", 0.0)
    monkeypatch.setattr("service.queues.redis.fanout.LATE", PATIENCE)


def random_slot() -> int:
    """Of the id of a submission without an idempotency key."""
    return random.SystemRandom().randrange(1 << 16)


def make_submission(
    num_requests: int = 1,
    *,
    identifier: str | None = None,
    tenant: str = "public",
    key: str | None = None,
    fingerprint: str = "body",
    grace: float | None = None,
    allowance: Allowance | None = None,
    manifest: str = '{"endpoint":"completions"}',
    keep: float | None = None,
    sent: str = "",
    **fields: Any,
) -> Submission:
    """`fields` are those of its requests; `sent` is its input."""
    slot = random_slot() if key is None else slot_of(key)
    identifier = identifier or f"s0-{uuid.uuid4().hex[:-4]}{slot:04x}"
    values: dict[str, Any] = {"prompt_ids": (1, 2, 3), "max_tokens": 16} | fields
    requests = tuple(
        GenerationRequest(
            id=request_id, tenant=tenant, sampling=SamplingParams(seed=7, choice=i), **values
        )
        for i, request_id in enumerate(child_ids(identifier, num_requests))
    )
    return Submission(
        id=identifier,
        tenant=tenant,
        requests=requests,
        manifest=manifest,
        idempotency_key=key,
        fingerprint=fingerprint,
        grace=grace,
        allowance=allowance,
        keep=keep,
        input=sent,
    )


def make_tokens(ids: Iterable[int], *, start: int = 0, before: Iterable[int] = ()) -> Tokens:
    """`before` are the ids of the answer up to `start`, for the digest."""
    ids = tuple(ids)
    digest = rolling_digest(ids, previous=rolling_digest(before))
    text = "".join(f" t{token}" for token in ids)
    return Tokens(start=start, ids=ids, text=text, digest=digest)


def make_engine(name: str = "e", *, numeric_class: str = "class-a", **fields: Any) -> EngineInfo:
    values: dict[str, Any] = {"version": "1", "features": ("grammar",)} | fields
    return EngineInfo(id=name, numeric_class=numeric_class, **values)


def oracle(request_id: str, index: int) -> int:
    """Token `index` of the only right answer to a request: one token shows loss, repetition and
    exchange.
    """
    return zlib.crc32(f"{request_id}:{index}".encode()) % 50_000


def answer_of(request_id: str, start: int, end: int) -> Tokens:
    """The right tokens `start .. end - 1` as a record."""
    ids = [oracle(request_id, i) for i in range(end)]
    return make_tokens(ids[start:], start=start, before=ids[:start])


def ids_of(records: Sequence[Record]) -> list[int]:
    return list(itertools.chain.from_iterable(r.ids for r in records if isinstance(r, Tokens)))


def stop_at(count: int, reason: FinishReason = FinishReason.STOP) -> End:
    return End(count=count, reason=reason)


def shards_in(queue: Queue) -> Sequence[RedisQueue]:
    """The shards of a queue in Redis."""
    if isinstance(queue, ShardedQueue):
        return queue._shards
    assert isinstance(queue, RedisQueue)
    return [queue]


def shard_with(queue: Queue, submission: Submission) -> RedisQueue:
    shards = shards_in(queue)
    return shards[shard_of(submission.id, shards=len(shards))]


async def count_stored(
    queue: Queue, submissions: Iterable[Submission]
) -> tuple[dict[str, int], dict[str, int]]:
    """Tenant -> bytes: as the queue counts them, and counted again from what it really holds of
    these submissions, the only ones that it was given.
    """
    if isinstance(queue, MemoryQueue):
        return dict(queue._submissions._bytes), _recount_memory(queue, submissions)
    counted: Counter[str] = Counter()
    again: Counter[str] = Counter()
    for shard in shards_in(queue):
        fields, gone = await shard._client.run(
            [("HGETALL", shard._keys.stored), ("ZRANGE", shard._keys.gone, 0, -1)]
        )
        sizes = {name.decode(): int(size) for name, size in fields.items()}
        assert sizes.pop("all", 0) == sum(sizes.values())
        counted.update({name.removeprefix("t:"): size for name, size in sizes.items()})
        for member in gone:
            size, tenant, _ = member.decode().split(" ")
            again[tenant] += int(size)
    for submission in submissions:
        again[submission.tenant] += await _live_bytes(shard_with(queue, submission), submission)
    return dict(counted), {tenant: size for tenant, size in again.items() if size}


def _recount_memory(queue: MemoryQueue, submissions: Iterable[Submission]) -> dict[str, int]:
    again: Counter[str] = Counter()
    for submission in submissions:
        if (group := queue._groups.get(submission.id)) is not None:
            kept = kept_bytes(submission) if group.is_kept else base_bytes(submission)
            if group.is_kept and not group.unfinished:
                kept += token_bytes(submission) * sum(entry.count for entry in group.entries)
            again[submission.tenant] += kept
        for request in submission.requests:
            entry = queue._entries.get(request.id)
            if entry is not None and entry.end is None:
                again[submission.tenant] += request_bytes(request)
        known = queue._submissions._keys.get((submission.tenant, submission.idempotency_key or ""))
        if known is not None and known[0] == submission.id:
            again[submission.tenant] += idempotency_bytes(submission)
    return {tenant: size for tenant, size in again.items() if size}


async def _live_bytes(queue: RedisQueue, submission: Submission) -> int:
    """Of bodies that are there, and of the rest while a request has not ended."""
    keys = queue._keys
    (left,), *bodies = await queue._client.run(
        [
            ("HMGET", keys.submission(submission.id), "left"),
            *(("HMGET", keys.request(r.id), "st", "body") for r in submission.requests),
        ]
    )
    size = kept_bytes(submission) if int(left or 0) else 0
    for request, (state, body) in zip(submission.requests, bodies, strict=True):
        assert (state in {b"queued", b"running"}) == (body is not None)
        if body is not None:
            assert len(body) <= request_bytes(request)
            size += request_bytes(request)
    return size


async def append(queue: Queue, lease: Lease, record: Record) -> WriteReply:
    """One record, one reply."""
    (reply,) = await queue.write([Write(lease, record)])
    return reply


async def claim_one(queue: Queue, engine: EngineInfo | None = None, *, wait: float = 0.0) -> Claim:
    (claim,) = await queue.claim(engine or make_engine(), limit=1, wait=wait)
    return claim


async def ids_claimed(queue: Queue, engine: EngineInfo, *, limit: int = 1) -> list[str]:
    """Ids of the requests that are claimed now, in order."""
    return [claim.request.id for claim in await queue.claim(engine, limit=limit, wait=0)]


async def finish(queue: Queue, claim: Claim, *, length: int) -> None:
    """Journals the rest of a claim's right answer and its end."""
    rid, start = claim.request.id, len(claim.tokens)
    if start < length:
        reply = await append(queue, claim.lease, answer_of(rid, start, length))
        assert reply == WriteReply(WriteStatus.OK, length)
    assert (await append(queue, claim.lease, stop_at(length))).status is WriteStatus.OK
